"""
Questions of bank customers, from strings to a repaired pipeline
================================================================

BANKING77 has 77 kinds of questions. In this long-tailed part of it 36 kinds have fewer than 20 training questions. A pipeline
of scikit-learn classifies them, and :class:`alphaext.sklearn.AlphaNetClassifier` repairs its rare classes.

The questions: Casanueva et al., BANKING77, CC BY 4.0.
"""

# %%
# Read the questions: pairs of a text and a class. ``banking77lt.json`` is in ``docs/examples/`` of the repository; a downloaded
# script or notebook needs it beside it.
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from alphaext.sklearn import AlphaNetClassifier

here = Path(__file__).parent if "__file__" in globals() else Path()
data = json.loads((here / "banking77lt.json").read_text())
names = np.array(data["classes"])
texts, labels = zip(*data["train"], strict=True)
test_texts, test_labels = zip(*data["test"], strict=True)
y, y_test = names[list(labels)], names[list(test_labels)]
print(texts[0], "->", y[0])

# %%
# Fit the pipeline and repair it: one estimator around the other.
pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=30, max_iter=300))
model = AlphaNetClassifier(pipeline, random_state=0).fit(texts, y)

# %%
# Measure both on the test questions. ``estimator_`` is the pipeline as it was.
kinds, counts = np.unique(y, return_counts=True)
rare = kinds[counts < 20]
before, after = (each.predict(test_texts) == y_test for each in (model.estimator_, model))
is_rare = np.isin(y_test, rare)
for name, own in (("few", is_rare), ("base", ~is_rare), ("all", np.ones_like(is_rare))):
    print(f"{name:4} {100 * before[own].mean():.1f}% -> {100 * after[own].mean():.1f}%")

# %%
# The picture: each rare kind of question before and after.
change = {kind: (100 * before[y_test == kind].mean(), 100 * after[y_test == kind].mean()) for kind in rare}
order = sorted(rare, key=change.__getitem__)
figure, axes = plt.subplots(figsize=(7, 7))
for place, kind in enumerate(order):
    axes.plot(change[kind], (place, place), color="tab:green" if change[kind][1] >= change[kind][0] else "tab:red")
    axes.plot(change[kind][1], place, "o", color="black", markersize=4)
axes.set_yticks(range(len(order)), [kind.replace("_", " ") for kind in order], fontsize=7)
axes.set(xlabel="recognised, % of test questions; the dot is after the repair", xlim=(0, 101))
figure.tight_layout()

# %%
# ``composed_estimator_`` is an ordinary scikit-learn pipeline. Saved, it needs neither ``alphaext`` nor ``torch``.
print(model.composed_estimator_)
