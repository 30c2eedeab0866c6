"""Several networks in lockstep, and what happens between and behind them."""
