"""BSoftmax: softmax with the class frequencies of train as a prior, which evaluation leaves away."""

from torch import Tensor
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method
from ..benchmark.task import Task
from .blocks.balance import class_counts


@method(
    "bsoftmax",
    paper="Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020 (without meta-sampler)",
    requires=Requires(),
)
class BSoftmax(Objective[NoConfig]):
    """`CE(z + log n_c, y)` on shuffled images; predictions are those of the plain z, as if classes were equally common.

    On equally large classes it is ERM, bit for bit. Deviations: no meta-sampler, as in SubpopBench; the recipe is the
    block's; selection is the rung's.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        counts = class_counts(task)
        self.log_counts = (counts / counts.max()).log()  # a common factor changes nothing; -inf for an empty class

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch.x) + self.log_counts, batch.y)
