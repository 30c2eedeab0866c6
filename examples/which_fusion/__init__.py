"""Which fusion? Every one of drifa_attn, on paired data, by one protocol."""
