"""`moemla claims`: prints the ledger. Built in chapter 19."""

import textwrap
from dataclasses import dataclass

import tyro

from moemla.commands.terminal import Flag
from moemla.errors import MoemlaError


@dataclass
class Claims:
    """The ledger: claims of the paper, what this project finds, and the status.

    With ids these entries are printed whole.
    """

    id: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these entries: an id (A2-mla), the start of some (A2), or a place of the paper ("Table 2", abstract)."""
    json: Flag[bool] = False
    """Print a JSON list."""

    def __call__(self) -> int:
        from difflib import get_close_matches

        from moemla.paper import claims

        known = claims.load_claims()
        starts = {claim.id.partition("-")[0] for claim in known}
        names = {name.lower(): name for name in starts | {claim.id for claim in known}}
        for name in self.id:
            if not any(claims.meant_by(claim, name) for claim in known):
                near = [names[one] for one in get_close_matches(name.lower(), names, n=5, cutoff=0.5)]
                raise MoemlaError(
                    f"no claim {name!r}; " + (f"near: {', '.join(near)}" if near else "see moemla claims")
                )
        if self.json or not self.id:
            return claims.main(list(self.id), as_json=self.json)
        for claim in claims.select(known, self.id):
            outcome = claims.evaluate(claim)
            parts = dict(where=claim.where, printed=claim.printed, ours=claims.show(claim, outcome))
            parts |= dict(status=outcome.status, how=outcome.detail, note=claim.note, source=claim.source)
            print(claim.id)
            for name, value in (parts | dict(chapter=claim.chapter)).items():
                if value:
                    lead = f"  {name:9}"
                    print(textwrap.fill(str(value), 100, initial_indent=lead, subsequent_indent=" " * len(lead)))
        return 0
