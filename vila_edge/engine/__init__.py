"""Engines: what runs a bundle's graphs on a device, behind one protocol."""
