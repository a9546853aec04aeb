"""Fidelity and diversity of samples with labels, measured in sets as large as the held-out one.

A judge of real images says which class a sample is and gives the features for precision, recall and the Fréchet
distance; spread within a class and contrast are taken in pixels, relative to held-out images.
"""

from typing import NamedTuple

import numpy as np

from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.evaluate import frechet, judges, precision_recall
from diffrl.recipes import judging
from diffrl.recipes.images import Session


class Ruler(NamedTuple):
    """What samples are measured with.

    num: images in a set, on which scores depend.  moments, features: of the training images, all and `num` of them.
    spread, contrast: of the held-out images.
    """

    num: int
    judge: judges.Judge
    moments: frechet.Moments
    features: np.ndarray
    spread: float
    contrast: float

    def measure(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Mean scores of the images [N, H, W, C] over their sets; N is a multiple of `num`."""
        starts = range(0, len(x), self.num)
        sets = [self._measure(x[i : i + self.num], labels[i : i + self.num]) for i in starts]
        return {name: float(np.mean([scored[name] for scored in sets])) for name in sets[0]}

    def _measure(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        features = self.judge.features(x)
        moments = frechet.update(frechet.Moments.empty(features.shape[1]), features)
        precision, recall = precision_recall.precision_recall(self.features, features)
        return {
            "recognised": judges.agreement(self.judge, x, labels),
            "precision": precision,
            "recall": recall,
            "frechet": frechet.frechet_distance(moments, self.moments),
            "spread": precision_recall.spread(x, labels) / self.spread,
            "contrast": float(x.std()) / self.contrast,
        }


def make_ruler(session: Session, held_out: Source) -> tuple[Ruler, dict[str, float]]:
    """The ruler of `session.config.eval`, and what it says of held-out images.

    Raises UserError where there can be no judge.
    """
    judge = judging.make_judge(session, held_out)
    if judge is None:
        raise UserError("fidelity is measured by a judge: set eval.judge and, for a ResNet, eval.judge_weights")
    num = min(session.config.eval.samples, held_out.length)
    x, labels = labelled(held_out, num)
    some = judge.features(labelled(session.source, num)[0])
    moments = judging.moments(judge, session.source)
    ruler = Ruler(num, judge, moments, some, precision_recall.spread(x, labels), float(x.std()))
    return ruler, ruler.measure(x, labels)


def labelled(source: Source, num: int) -> tuple[np.ndarray, np.ndarray]:
    """`num` images spread evenly over the set, in [-1, 1], and their labels."""
    x, labels = judging.spread(source, num)
    return x, np.asarray(labels)
