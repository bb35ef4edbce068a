"""Run in a process of its own: python resume.py MODEL FOLDER save|continue; prints a digest of what follows."""

from __future__ import annotations

import hashlib
import sys

import torch

from kvfold.loading import load
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.session import Session

STEPS = 200
TEXT = "Every function of this library returns either a value or an error; the tables below say which, and when. " * 30


def follow(session: Session) -> str:
    """Sampled tokens and logits of STEPS steps, as one digest."""
    h = hashlib.sha256()
    token = 17
    for _ in range(STEPS):
        logits = session.extend([token])
        token = session.sampler.pick(logits)
        h.update(logits.float().numpy().tobytes() + token.to_bytes(4, "little"))
    return h.hexdigest()


def main(source: str, folder: str, what: str) -> None:
    torch.set_num_threads(1)
    loaded = load(source)
    if what == "save":
        session = Session.new(loaded.model, loaded.tokenizer, sampler=Sampler(temperature=0.7, seed=11))
        session.extend(loaded.tokenizer(TEXT)["input_ids"])
        session.sampler.pick(torch.zeros(5))
        session.save(folder)
    else:
        session = Session.load(folder, loaded.model, loaded.tokenizer)
    print(follow(session), len(session.tokens), session.sampler.drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
