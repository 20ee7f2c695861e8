"""Program of launcher/plan.py: plans a run and prints the plan."""

import json
from pathlib import Path

from sparse_lora_dist.errors import as_user_error
from sparse_lora_dist.plan.output import Outcome, as_json, as_text
from sparse_lora_dist.plan.plan_options import PlanRequest
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
from sparse_lora_dist.plan.shapes import shapes_of


def plan(request: PlanRequest) -> None:
    """Plan a run, print the plan as text or JSON, and plot it if ``--plot`` is given.

    Args:
        request: the run to plan, the planner's options, and the content of the engine file, which
            is the DeepSpeed JSON file.

    Raises:
        UserError: if the model's config.json cannot be used, the method's schedule does not fit
            into the steps of the run, or the plot cannot be written.
    """
    options = request.plan
    on_gpu = options.gpu_bytes > 0
    model = request.config.model.model
    with as_user_error(f"--model {model}", "Check its config.json, or download it again."):
        shapes = shapes_of(request.config, whole_logits=options.whole_logits, on_gpu=on_gpu)
    outcome = Outcome(
        shapes=shapes,
        engine=PlannedEngine.of(request.engine),
        ranks=Ranks(world_size=options.world_size, nodes=options.nodes, on_gpu=on_gpu),
        plan=options,
    )
    print(json.dumps(as_json(outcome), indent=1) if options.json else as_text(outcome))
    if options.plot is not None:
        from sparse_lora_dist.plan.plot import draw

        draw(outcome, Path(options.plot))
