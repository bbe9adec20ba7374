"""The zoo: a small real text-to-picture base and the populations grown from it."""
