"""Methods that understand weights: encoders, heritage, and the zoo that grows models to test on."""
