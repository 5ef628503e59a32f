"""From what a user hands in to RGB arrays. The only place that decodes media."""
