"""Where models are served: what each runtime loads of which class, and what a shape has to be for it."""
