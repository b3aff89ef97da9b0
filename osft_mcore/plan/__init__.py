"""What a run will need, before there is a GPU to try it on."""
