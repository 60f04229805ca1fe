"""The self-check: no kernel is trusted on hardware before it was compared with float64 there (:mod:`.judge`)."""
