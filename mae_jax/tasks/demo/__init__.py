"""The task demo: a page, served to this machine only, that shows what a trained model makes of a picture."""
