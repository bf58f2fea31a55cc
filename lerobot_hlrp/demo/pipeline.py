"""The demo's steps: each is the plain command that a user can run alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lerobot_hlrp.demo.presets import Preset, Training
from lerobot_hlrp.demo.runner import Step

LOG_FREQ = 50
# A recording has a seed for each of its episodes, counted from its own. These keep all recordings apart.
FIRST_TIER_SEED = 1_000_000
SEED_DISTANCE = 2_000_000
TRAINING_SEED = 1000  # lerobot-train's default
MAX_SEED = 1000


@dataclass(frozen=True)
class Data:
    """A dataset of the demo, and its labels.

    Args:
        repo_id: its name.
        root: folder of the dataset.
        table: file of its codes.
        tiers: of the tabletop.
        seed: of the recording.
        suffix: of the names of steps that make it.
        episodes: that are recorded, of all tiers together.
    """

    repo_id: str
    root: Path
    table: Path
    tiers: tuple[str, ...]
    seed: int
    episodes: int
    suffix: str = ""

    @property
    def flags(self) -> list[str]:
        return [f"--dataset.repo_id={self.repo_id}", f"--dataset.root={self.root}"]


@dataclass(frozen=True)
class Evaluation:
    """One `lerobot-eval` run.

    Args:
        name: of its folder.
        policy: folder of the trained policy.
        tier: of the tabletop.
        instructions: `true`, `shuffled` or `none`.
    """

    name: str
    policy: Path
    tier: str
    instructions: str


class Pipeline:
    """Paths and commands of one demo folder.

    Args:
        folder: where everything goes.
        preset: how much of it.
        seed: another one gives other scenes, weights and batches. The scenes of the evaluation stay the same.
    """

    def __init__(self, folder: Path, preset: Preset, *, seed: int = 0):
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed: expected 0 to {MAX_SEED}, got {seed}. Next step: choose one of these.")
        self.folder = folder
        self.preset = preset
        self.seed = seed
        self.data = Data(
            "hlrp/tabletop",
            folder / "dataset",
            folder / "codes.safetensors",
            preset.tiers,
            seed=seed * SEED_DISTANCE,
            episodes=preset.episodes * len(preset.tiers),
        )
        self.first_data = self._plan_first_data() if preset.first_codes is not None else None
        self.laq = folder / "laq"
        self.codes_figures = folder / "codes_eval.json"
        self.evaluations = self._plan_evaluations()
        self.evaluations_without_words = self._plan_evaluations_without_words()

    # -- what is trained ------------------------------------------------------------------------------------------

    def training(self, stage: str, *, words: bool = True) -> Path:
        return self.folder / (stage if words else f"{stage}_without_words")

    def checkpoint(self, stage: str, *, words: bool = True) -> Path:
        return self.training(stage, words=words) / "checkpoints" / "last" / "pretrained_model"

    def _plan_first_data(self) -> Data:
        tier = self.preset.tiers[0]
        table = self.folder / f"codes_{tier}.safetensors"
        return Data(
            f"hlrp/tabletop_{tier}",
            self.folder / f"dataset_{tier}",
            table,
            (tier,),
            seed=self.data.seed + FIRST_TIER_SEED,
            episodes=self.preset.first_episodes,
            suffix=f"_{tier}",
        )

    def _plan_evaluations(self) -> list[Evaluation]:
        policy = self.checkpoint("stage3")
        return [
            Evaluation(f"{tier}_{instructions}", policy, tier, instructions)
            for tier in self.preset.tiers
            for instructions in ("true", "shuffled")
        ]

    def _plan_evaluations_without_words(self) -> list[Evaluation]:
        if not self.preset.without_words:
            return []
        policy = self.checkpoint("stage3", words=False)
        return [Evaluation(f"{tier}_without_words", policy, tier, "true") for tier in self.preset.tiers]

    # -- the commands ---------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All of them, in an order in which they can run."""
        return [*self.common_steps(), *(step for branch in self.branches() for step in branch)]

    def common_steps(self) -> list[Step]:
        """What every policy needs: data, quantiser, labels, backbone."""
        datasets = [self.data] if self.first_data is None else [self.data, self.first_data]
        steps = [self._record(data) for data in datasets]
        return [*steps, self._train_laq(), *(self._label(data) for data in datasets), self._backbone()]

    def branches(self) -> list[list[Step]]:
        """For each policy its steps after those; they need nothing of each other."""
        with_words = [*self.stage2_steps(), self._evaluate_codes(), self._train_actions()]
        branches = [with_words + [self._evaluate(evaluation) for evaluation in self.evaluations]]
        if self.preset.without_words:
            without = [*self.stage2_steps(words=False), self._train_actions(words=False)]
            branches.append(without + [self._evaluate(one) for one in self.evaluations_without_words])
        return branches

    def _record(self, data: Data) -> Step:
        command = ["hlrp-record", "--env.type=hlrp_tabletop", f"--env.task={','.join(data.tiers)}", *data.flags]
        command += [f"--episodes={data.episodes}", f"--noise={self.preset.noise}", f"--seed={data.seed}"]
        title = f"Record demonstrations of the scripted expert: {', '.join(data.tiers)}"
        return Step(f"record{data.suffix}", title, command, data.root, lambda: command)

    def _train_laq(self) -> Step:
        preset, data = self.preset, self.first_data or self.data
        command = ["hlrp-laq-train", *data.flags, f"--output_dir={self.laq}"]
        command += [f"--laq.frame_gap={preset.frame_gap}", f"--laq.codebook_size={preset.codebook_size}"]
        command += [f"--laq.code_seq_len={preset.code_seq_len}"]
        command += [f"--steps={preset.laq_steps}", f"--batch_size={preset.laq_batch_size}"]
        command += [f"--laq.num_layers={preset.laq_num_layers}", f"--seed={self.seed}"]
        title = "Stage 1: train the latent-action quantiser on frame pairs (no actions)"
        return Step("stage1", title, command, self.laq, lambda: command)

    def _label(self, data: Data) -> Step:
        command = ["hlrp-label", f"--laq={self.laq}", *data.flags, f"--output={data.table}"]
        title = f"Label every frame pair with its codes: {', '.join(data.tiers)}"
        return Step(f"label{data.suffix}", title, command, data.table, lambda: command)

    def _backbone(self) -> Step:
        folder = self.folder / "backbone"
        command = ["hlrp-backbone", "--family=qwen3_vl", "--size=tiny", f"--output={folder}", f"--seed={self.seed}"]
        return Step("backbone", "Make a tiny, randomly initialised Qwen3-VL checkpoint", command, folder)

    def stage2_steps(self, *, words: bool = True) -> list[Step]:
        """One training on all tiers, or one on the first tier and one from there."""
        preset = self.preset
        if self.first_data is None:
            return [self._train_codes("stage2", self.data, preset.codes, words=words)]
        assert preset.first_codes is not None
        first = f"stage2{self.first_data.suffix}"
        start = self.checkpoint(first, words=words)
        return [
            self._train_codes(first, self.first_data, preset.first_codes, words=words),
            self._train_codes("stage2", self.data, preset.codes, start=start, words=words),
        ]

    def _train_codes(
        self, stage: str, data: Data, training: Training, *, start: Path | None = None, words: bool = True
    ) -> Step:
        if start is not None:  # prompt and backbone are those of the checkpoint
            policy = [f"--policy.path={start}", "--policy.mode=codes"]
        else:
            policy = ["--policy.type=hlrp_qwen", "--policy.mode=codes", f"--policy.backbone={self.folder / 'backbone'}"]
            policy += ["--policy.prompting=plain", *([] if words else ["--policy.prompt.use_instruction=false"])]
        command = ["lerobot-train", *data.flags, *policy, f"--policy.codes={data.table}"]
        command += self._training_flags(training, self.training(stage, words=words))
        title = f"Stage 2: teach the vision-language model to predict the codes of {', '.join(data.tiers)}"
        return self._train_step(stage, title, command, words=words)

    def _evaluate_codes(self) -> Step:
        command = ["hlrp-eval-codes", f"--policy.path={self.checkpoint('stage2')}", *self.data.flags]
        command += [f"--codes={self.data.table}", f"--dataset.eval_split={self.preset.holdout_share}"]
        command += [f"--output={self.codes_figures}"]
        title = "Stage 2: code accuracy on held-out episodes"
        return Step("stage2_eval", title, command, self.codes_figures)

    def _train_actions(self, *, words: bool = True) -> Step:
        preset = self.preset
        command = ["lerobot-train", *self.data.flags, f"--policy.path={self.checkpoint('stage2', words=words)}"]
        command += ["--policy.mode=actions", "--policy.action_head=prefix_flow"]
        command += [f"--policy.action_expert.{name}={value}" for name, value in preset.head.items()]
        command += [f"--policy.chunk_size={preset.chunk_size}", f"--policy.n_action_steps={preset.n_action_steps}"]
        command += self._training_flags(preset.actions, self.training("stage3", words=words))
        if preset.actions.eval_freq:
            command += ["--env.type=hlrp_tabletop", f"--env.task={preset.tiers[0]}"]
            command += [f"--eval.n_episodes={preset.eval_curve_episodes}"]
            command += [f"--eval.batch_size={preset.eval_curve_episodes}"]
        title = "Stage 3: attach a flow-matching expert and learn actions"
        return self._train_step("stage3", title, command, words=words)

    def _train_step(self, stage: str, title: str, command: list[str], *, words: bool) -> Step:
        folder = self.training(stage, words=words)
        config = self.checkpoint(stage, words=words) / "train_config.json"
        state = config.parents[1] / "training_state" / "training_step.json"

        def resume() -> list[str] | None:
            if not (config.is_file() and state.is_file()):
                return None
            return ["lerobot-train", f"--config_path={config}", "--resume=true"]

        def reached() -> int:
            return json.loads(state.read_text())["step"]

        return Step(folder.name, title if words else f"{title}, without words", command, folder, resume, reached)

    def _training_flags(self, training: Training, folder: Path) -> list[str]:
        flags = [f"--output_dir={folder}", f"--steps={training.steps}", f"--batch_size={training.batch_size}"]
        flags += [f"--policy.optimizer_lr={training.lr}", f"--policy.scheduler_warmup_steps={training.warmup}"]
        flags += [f"--policy.optimizer_betas=[0.9,{training.beta2}]"]
        flags += [f"--save_freq={training.save_freq}", f"--log_freq={LOG_FREQ}"]
        flags += [f"--env_eval_freq={training.eval_freq}"]
        flags += [f"--num_workers={self.preset.num_workers}", f"--dataset.eval_split={self.preset.holdout_share}"]
        return [*flags, f"--seed={TRAINING_SEED + self.seed}", "--policy.device=cpu"]

    def _evaluate(self, evaluation: Evaluation) -> Step:
        episodes = self.preset.eval_episodes
        folder = self.evaluation_folder(evaluation)
        command = ["lerobot-eval", f"--policy.path={evaluation.policy}", "--env.type=hlrp_tabletop"]
        command += [f"--env.task={evaluation.tier}", f"--env.instructions={evaluation.instructions}"]
        command += [f"--eval.n_episodes={episodes}", f"--eval.batch_size={min(episodes, 25)}"]
        command += ["--policy.device=cpu", f"--output_dir={folder}"]
        title = f"Evaluate: {evaluation.name.replace('_', ', ', 1).replace('_', ' ')}"
        return Step(f"eval_{evaluation.name}", title, command, folder)

    def evaluation_folder(self, evaluation: Evaluation) -> Path:
        return self.folder / "eval" / evaluation.name

    def success(self, evaluation: Evaluation) -> float:
        """Share of successful episodes, in [0, 1]."""
        info = json.loads((self.evaluation_folder(evaluation) / "eval_info.json").read_text())
        return info["overall"]["pc_success"] / 100
