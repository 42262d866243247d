"""The settings of the study, and the worlds of its experiments."""

from __future__ import annotations

from dataclasses import dataclass

from afa.studies.results.parts import Experiment

#: the worlds of each experiment, in the order of its horizontal axis; the main experiment is one
#: more place on the axes of data and divergence
WORLDS_OF: dict[Experiment, tuple[str, ...]] = {
    Experiment.MAIN: ("main",),
    Experiment.PRIVATE: ("private",),
    Experiment.DATA: ("main",),
    Experiment.DIVERGENCE: ("after-50", "after-200", "after-700"),
    Experiment.EXPERTS: ("split-2", "split-4", "split-8"),
}
#: experiments with all rivals and several seeds, though block weights are searched in the main one
#: alone; the others have the rows of their figures
WITH_ALL_RIVALS = (Experiment.MAIN, Experiment.PRIVATE)


@dataclass(frozen=True)
class StudySettings:
    """Settings of the study; all were chosen on development or tuning prompts.

    Steps and rates of aggregators are replaced by what development prompts choose; see
    `afa.studies.results.development`.

    Attributes:
        num_seeds: trainings of each row of which a sentence speaks.
        aggregator_lengths: lengths of the training of aggregators; development prompts choose one.
        aggregator_rates: their learning rates, chosen in the same way at the shortest length; one
            more is tried beyond the best one if it is at an end.
        aggregator_steps: of the aggregators.
        batch_size: pictures in a step of everything that is trained.
        aggregator_rate: learning rate of the aggregators.
        predictions_steps: of the aggregators that fuse predictions only.
        predictions_rate: their learning rate.
        tuned_steps: lengths of the tuned models; the last one has three seeds.
        total_steps: of one more tuned base, which sees as many pictures in all as AFA, its experts
            included.
        tuned_rates: learning rates of the tuned base and the tuned merge, of which the best one on
            tuning prompts is taken; one more is tried beyond the best one if it is at an end.
        lora_rank: rank of the LoRA on the base.
        lora_rates: the same for it.
        distilled_pictures: pictures that a teacher draws.
        distilled_steps: of a student, with twice the batch.
        distilled_rate: its learning rate, as chosen in the study of distillation.
        num_pictures: different scenes in the data of everything that is trained.
        curve_pictures: the same for the data curve.
        curve_steps: lengths of the tuned models of the data curve, of which tuning prompts choose
            one for each number of pictures; that of AFA is one more.
        num_mixed: test prompts of pairs of two experts in the main experiment, which has all that
            there are.
        num_mixed_elsewhere: the same in each group of the other experiments, which have the first
            ones.
        num_own: test prompts of each expert.
        num_development: prompts for development, in each group.
        num_tuning: prompts for tuning, in each group.
        num_steps: denoising steps.
        other_steps: denoising steps of further rows of the ensemble, which ask how many it needs.
        test_seed: seed of the noise of the test.
        num_references: real scenes to compare sets of pictures with.
        margin: difference of shares of right pictures that does not matter.
        num_resamples: of the bootstrap.
    """

    num_seeds: int = 3
    aggregator_lengths: tuple[int, ...] = (1_000, 3_000)
    aggregator_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    aggregator_steps: int = 1_000
    batch_size: int = 16
    aggregator_rate: float = 1e-3
    predictions_steps: int = 1_000
    predictions_rate: float = 1e-3
    tuned_steps: tuple[int, ...] = (1_000, 3_000)
    total_steps: int = 15_000
    tuned_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    lora_rank: int = 16
    lora_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    distilled_pictures: int = 1_000
    distilled_steps: int = 2_000
    distilled_rate: float = 1e-3
    num_pictures: int = 100_000
    curve_pictures: tuple[int, ...] = (100, 300, 1_000, 10_000)
    curve_steps: tuple[int, ...] = (100, 300, 1_000)
    num_mixed: int = 780
    num_mixed_elsewhere: int = 384
    num_own: int = 128
    num_development: int = 48
    num_tuning: int = 48
    num_steps: int = 10
    other_steps: tuple[int, ...] = (5, 20)
    test_seed: int = 11
    num_references: int = 2_000
    margin: float = 0.05
    num_resamples: int = 10_000
