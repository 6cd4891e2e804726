"""What a config will need and cost on hardware that is not here."""
