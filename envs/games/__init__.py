"""Logic games with oracles that know every answer."""
