"""The loops: online SFT and the SFT phase before it."""
