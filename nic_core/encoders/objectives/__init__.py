"""Section 3: training objectives of encoders, one module each."""
