"""What encoders are trained for: one module an objective."""
