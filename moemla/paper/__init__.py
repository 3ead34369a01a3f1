"""The paper judged: a ledger of what it prints, what that comes to, and its formulas as printed."""
