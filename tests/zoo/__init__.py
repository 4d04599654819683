"""Small models in the style of well-known families, in plain torch, as people write them for one device."""
