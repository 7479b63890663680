"""A client in another language: Node, against real services with TLS and tokens."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme

from serving.process import started

NODE = Path(__file__).parents[2] / "client" / "node"

pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(
        shutil.which("node") is None or not (NODE / "node_modules").is_dir(),
        reason="no node, or not its packages: make deps-external",
    ),
]

TOKEN = "of-the-node-client-0123456789"


def run(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["node", str(NODE / "example.mjs"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_node_example_with_tls_and_a_token(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    ca, chain, key, token, tokens = (
        tmp_path / name for name in ("ca.pem", "chain.pem", "key.pem", "token", "tokens.toml")
    )
    authority.cert_pem.write_to_path(ca)
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    token.write_text(TOKEN)
    tokens.touch(0o600)
    tokens.write_text(f'[[token]]\nname = "node"\ntoken = "{TOKEN}"\nscopes = ["read", "write"]\n')
    every = ["--port", "0", "--tls-certificate-file", str(chain), "--tls-key-file", str(key)]
    every += ["--tokens-file", str(tokens)]
    to_embedder = ["--embedder-ca-file", str(ca), "--embedder-token-file", str(token)]
    with started(
        "embedder", [*every, "--data-dir", str(tmp_path / "e")], log=tmp_path / "embedder.log"
    ) as embedder:
        flags = [*every, "--data-dir", str(tmp_path / "p"), "--embedder", embedder.address]
        flags += ["--embedder-deadline-ms", "30000", *to_embedder]
        with started("predictor", flags, log=tmp_path / "predictor.log") as predictor:
            # By name: TLS has no server names that are addresses.
            addresses = [each.replace("127.0.0.1", "localhost") for each in
                         (embedder.address, predictor.address)]  # fmt: skip
            known = ["--embedder", addresses[0], "--predictor", addresses[1]]
            done = run(*known, "--ca-file", ca, "--token-file", token)
            without = run(*known, "--ca-file", ca)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "2 items and 1 event taken"
    assert re.fullmatch(r"found tea-1 0\.\d{3}", lines[1])
    assert lines[3] == "a vector of 384, length 1.000"
    assert lines[4] == "next: buy 100.0%"
    items = [line.split()[1] for line in lines if line.startswith("item: ")]
    assert sorted(items) == ["mug-1", "tea-1"]
    assert lines[-1] == "error: INVALID_ARGUMENT BAD_K query.k"
    assert without.stdout.strip() == "error: UNAUTHENTICATED TOKEN_MISSING"
