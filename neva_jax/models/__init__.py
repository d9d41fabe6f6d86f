"""What the nets are: one file = one published architecture, each with its Config, its block and its model. Speech encoders will be files beside these."""
