"""Terms of the AMOEBA family of polarizable force fields."""
