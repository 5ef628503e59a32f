"""What a bundle does on the machine at hand: `run.bench` measures, `report` writes it down for people."""
