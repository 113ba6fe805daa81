"""Where token weights and anchors come from as a training goes."""
