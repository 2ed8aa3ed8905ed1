"""Intel Neural Compressor 2: `with_inc.py MODEL FEEDS OUT JSON`; settings: algorithm (minmax, kl or percentile)."""

from __future__ import annotations

from collections.abc import Iterator

from neural_compressor import PostTrainingQuantConfig, quantization
from shared import Feed, batches, job


class Loader:
    """Its calibration loader: pairs of a feed and a label that nothing reads."""

    def __init__(self, feeds: list[Feed]) -> None:
        """Keep the batches."""
        self._feeds = feeds
        self.batch_size = len(next(iter(feeds[0].values())))

    def __iter__(self) -> Iterator[tuple[Feed, int]]:
        """Batch by batch."""
        return iter([(feed, 0) for feed in self._feeds])


def main() -> None:
    """Quantize one file: QDQ, uint8 activations, int8 weights per channel."""
    task = job()
    loader = Loader(list(batches(task.feeds)))
    activation = {"dtype": ["uint8"], "scheme": ["asym"], "algorithm": [task.settings["algorithm"]]}
    weight = {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"]}
    config = PostTrainingQuantConfig(
        approach="static",
        quant_format="QDQ",
        quant_level=1,
        calibration_sampling_size=[loader.batch_size * len(list(loader))],
        op_type_dict={".*": {"activation": activation, "weight": weight}},
    )
    quantization.fit(str(task.model), config, calib_dataloader=loader).save(str(task.out))


if __name__ == "__main__":
    main()
