"""What joins training and probes: single experiments and the demo."""
