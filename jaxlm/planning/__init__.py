"""What a run will need and how fast it can be, before there is a machine to run it on."""
