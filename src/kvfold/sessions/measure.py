"""What sessions cost: restoring against recomputing, files against memory, and many long ones under one budget."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvfold.adapters.hf_transformers import FoldedLayer
from kvfold.config import PAGE_TOKENS
from kvfold.evaluation.text import haystack, stream
from kvfold.loading import Loaded
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.budget import BudgetedRunner
from kvfold.sessions.segments import checksum
from kvfold.sessions.session import Session
from kvfold.sessions.store import SessionStore


def restore(loaded: Loaded, context: int, profile: str) -> dict[str, float | int]:
    """Prefill `context` tokens, save, load: seconds of the thread's CPU and of the clock, and bytes.

    file_bytes: all of the session's folder. folded_bytes: what the session takes in memory. page_bytes: its pages alone.
    """
    tokens = stream(haystack(), loaded.tokenizer, context)[:context]
    session = Session.new(loaded.model, loaded.tokenizer, profile)
    session.runner.new_cache()  # the first call of a model is slow
    recompute = _timed(lambda: session.extend(tokens))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "session"
        save = _timed(lambda: session.save(folder))
        back: list[Session] = []
        load = _timed(lambda: back.append(Session.load(folder, loaded.model, loaded.tokenizer)))
        file_bytes = sum(p.stat().st_size for p in folder.iterdir())
    if not torch.equal(back[0].extend([5]), session.extend([5])):
        raise RuntimeError("the restored session does not continue like the one that was saved")
    pages = sum(len(s.pages) * s.pool.page_bytes for x in session.cache.folded_layers for s in x.folded.sequences)
    return {
        "context": context,
        "recompute_seconds": recompute[0],
        "recompute_cpu_seconds": recompute[1],
        "save_seconds": save[0],
        "restore_seconds": load[0],
        "restore_cpu_seconds": load[1],
        "restore_share": load[0] / recompute[0],
        "restore_cpu_share": load[1] / recompute[1],
        "file_bytes": file_bytes,
        "folded_bytes": session.nbytes,
        "page_bytes": pages,
        "file_over_folded": file_bytes / session.nbytes,
    }


def _timed(work: Any) -> tuple[float, float]:
    """Seconds of the clock and of the process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def crowd(sessions: int, context: int, memory: str, profile: str) -> dict[str, float | int]:
    """Sessions of a model with the caches of a 4B hybrid, filled with synthetic pages, in a process of its own: decoded
    together if they fit, else in turn by way of the disk. Peak resident bytes are the process's."""
    command = [sys.executable, "-m", __name__, str(sessions), str(context), memory, profile]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _model() -> Any:
    """The caches of a 4B hybrid (32 layers, 8 of them attention with 4 KV heads of 256, 16 query heads), and little else."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=1 << 20,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=0,
        num_experts_per_tok=0,
        mlp_only_layers=list(range(32)),
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(32)],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _inflate(session: Session, runner: BudgetedRunner, context: int, seed: int) -> None:
    """Make a session one of `context` tokens whose pages are random codes under the scales of a page that it has."""
    spec, g = session.cache.spec, torch.Generator().manual_seed(seed)
    folded = spec.folded_tokens(context)
    for layer in session.cache.folded_layers:
        s = layer.folded.sequences[0]
        pattern = layer.folded.canonical(s.pages[0])
        codes = _code_bytes(layer)
        with runner.budget.room(pages=folded // PAGE_TOKENS):
            pages = []
            for _ in range(folded // PAGE_TOKENS):
                pattern[codes] = torch.randint(0, 256, (int(codes.sum()),), dtype=torch.uint8, generator=g)
                pages.append(layer.folded.adopt(pattern, checksum(pattern)))
        exact = s.exact()
        n = min(exact[0].shape[1], spec.ring_tokens())
        for page in s.pages:
            s.pool.release(page)
        s.restore(pages, context, folded, (exact[0][:, -n:].clone(), exact[1][:, -n:].clone()), s.state)
        layer.columns = context
    session.tokens = [int(t) for t in torch.randint(3, 256, (context,), generator=g)]


def _code_bytes(layer: FoldedLayer) -> torch.Tensor:
    """Which bytes of a canonical page are codes, bool [page_bytes]."""
    layout = layer.folded.engine.layout  # type: ignore[union-attr]
    region = torch.zeros(layout.head_bytes, dtype=torch.bool)
    for side in ("key", "value"):
        for f in getattr(layout, side):
            at = layout.offset(side, f.name)
            region[at : at + f.page_bytes] = f.kind == "codes"
    return region.repeat(layout.kv_heads)


def _run(sessions: int, context: int, memory: str, profile: str) -> dict[str, float | int]:
    base = _peak()
    with tempfile.TemporaryDirectory() as disk:
        store = SessionStore(_model(), memory=memory, disk=disk, profile=profile, ways_back=0)
        most = 0
        wanted = []
        start = 2 * PAGE_TOKENS + store.runner.spec.window + context % PAGE_TOKENS
        for i in range(sessions):
            session = store.open(f"s{i}")
            session.extend([3 + (i + t) % 250 for t in range(start)])
            _inflate(session, store.runner, context, i)
            wanted.append(session.fork().extend([7]))
            store.release(session)
            most = max(most, store.nbytes)
        began = time.perf_counter()
        together = store.report()["sessions_in_memory"] == sessions
        if together:
            opened = [store.open(f"s{i}") for i in range(sessions)]
            with SessionBatch(opened) as batch:
                for _ in range(4):
                    batch.step([7] * sessions)
            most = max(most, store.nbytes)
        else:
            for i in range(sessions):
                session = store.open(f"s{i}")
                if not torch.equal(session.extend([7]), wanted[i]):
                    raise RuntimeError(f"session {i} came back other than it went")
                store.release(session)
                most = max(most, store.nbytes)
        seconds = time.perf_counter() - began
        report = store.report()
    return {
        "sessions": sessions,
        "context": context,
        "together": int(together),
        "memory_limit_bytes": report["memory_limit_bytes"],
        "most_bytes": most,
        "peak_resident_bytes": _peak(),
        "base_resident_bytes": base,
        "written_out": report["written_out"],
        "brought_back": report["brought_back"],
        "decode_seconds": seconds,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.stdout.write(json.dumps(_run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])) + "\n")
