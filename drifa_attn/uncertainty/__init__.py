"""Several passes of a network and what they tell about its predictions."""
