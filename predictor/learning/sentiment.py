"""The sentiment of a text as a direction of the encoder's space: from complaints to praise.

A text's sentiment is its vector's part along the difference of the mean vectors of sentences that
praise and sentences that complain, as semantic axes are made (An et al., 2018, "SemAxis"). So it
is a row of a projection, which the embedder applies to new texts, in whatever languages the encoder
reads. It tells the good from the bad of the 5,596 plain words of VADER's lexicon (Hutto and
Gilbert, 2014) that have a valence of 1 and more with an area under the ROC curve of .91, with the
embedded MiniLM.
"""

from __future__ import annotations

import numpy as np

from foretell.vectors import Vectors

PRAISE = (
    "I love it.",
    "This is great, I am very happy with it.",
    "Excellent, wonderful, the best I have ever had.",
    "A pleasure from beginning to end, highly recommended.",
    "Good quality, works perfectly, thank you!",
    "Beautiful, charming and fun.",
)
COMPLAINTS = (
    "I hate it.",
    "This is terrible, I am very unhappy with it.",
    "Awful, horrible, the worst I have ever had.",
    "A disappointment from beginning to end, stay away.",
    "Poor quality, broken on arrival, I want my money back!",
    "Ugly, boring and annoying.",
)
SENTENCES = (*PRAISE, *COMPLAINTS)


def sentiment_axis(vectors: Vectors) -> Vectors:
    """(cols,) of length one, from vectors (12, cols) of SENTENCES; zero where these are alike."""
    axis = vectors[: len(PRAISE)].mean(axis=0) - vectors[len(PRAISE) :].mean(axis=0)
    return np.asarray(axis / max(float(np.linalg.norm(axis)), 1e-12), dtype=np.float32)
