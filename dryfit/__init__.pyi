"""Types of the names that ``dryfit`` imports when they are asked for."""

from dryfit.analytic.estimate import estimate as estimate
from dryfit.ask import Answer as Answer
from dryfit.ask import fit as fit
from dryfit.ask.trainer import MeasureSteps as MeasureSteps
from dryfit.ask.trainer import StopIfItWontFit as StopIfItWontFit
from dryfit.ask.trainer import WontFit as WontFit
from dryfit.cards.gpus import Gpu as Gpu
from dryfit.common.errors import UserError as UserError
from dryfit.engine.patching import on_meta as on_meta
from dryfit.engine.report import History as History
from dryfit.engine.report import Report as Report
from dryfit.engine.trace import Options as Options
from dryfit.engine.trace import measure_step as measure_step
from dryfit.engine.trace import trace_step as trace_step
from dryfit.engine.trainer import trace_trainer as trace_trainer
from dryfit.hours.run_time import Run as Run
from dryfit.scenario.scenario import Scenario as Scenario
from dryfit.tracing.measure import measure as measure
from dryfit.tracing.trace import trace as trace
