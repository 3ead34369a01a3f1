"""The paper's experiments: measured results (`results`), the ledger of its numbers (`claims`), and one
module a table."""
