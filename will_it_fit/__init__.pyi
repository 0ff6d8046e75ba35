"""Types of the names that ``will_it_fit`` imports when they are asked for."""

from will_it_fit.analytic.estimate import estimate as estimate
from will_it_fit.ask import Answer as Answer
from will_it_fit.ask import will_it_fit as will_it_fit
from will_it_fit.ask.trainer import MeasureSteps as MeasureSteps
from will_it_fit.ask.trainer import StopIfItWontFit as StopIfItWontFit
from will_it_fit.ask.trainer import WontFit as WontFit
from will_it_fit.cards.gpus import Gpu as Gpu
from will_it_fit.common.errors import UserError as UserError
from will_it_fit.engine.patching import on_meta as on_meta
from will_it_fit.engine.report import History as History
from will_it_fit.engine.report import Report as Report
from will_it_fit.engine.trace import Options as Options
from will_it_fit.engine.trace import measure_step as measure_step
from will_it_fit.engine.trace import trace_step as trace_step
from will_it_fit.hours.run_time import Run as Run
from will_it_fit.scenario.scenario import Scenario as Scenario
from will_it_fit.tracing.measure import measure as measure
from will_it_fit.tracing.trace import trace as trace
