//! What is asked of a machine while it lives, as plain data, and the machine that does it.
//!
//! Whoever asks, the command line or a client of the control socket, asks here. A request never waits for the guest.

use devices::{DeviceReply, DeviceRequest};

use crate::config::VmConfig;
use crate::machine::{Paused, Running};
use crate::outcome::Outcome;

/// One request.
#[derive(Debug)]
pub enum ControlRequest {
    /// What the machine is called, and its state.
    Describe,
    /// What it is, with all that has been changed since its start.
    Config,
    /// Has a machine run that has just been built.
    Start,
    /// Stops the processors where they are.
    Pause,
    /// Lets them run on.
    Resume,
    /// Presses the power button. A guest may or may not listen to it.
    PressPowerButton,
    /// Something of its devices.
    Device(DeviceRequest),
}

/// What a request gives.
#[derive(Debug)]
pub enum ControlReply {
    /// It is done.
    Done,
    /// The machine's name, where it has one, and its state.
    Description(Option<String>, State),
    /// What the machine is.
    Config(Box<VmConfig>),
    /// What a device says.
    Device(DeviceReply),
}

/// What a machine's processors do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// They never ran.
    NotStarted,
    /// They run.
    Running,
    /// They ran, and have been stopped.
    Paused,
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Who asks is at fault: not in this state.
    #[error("{0}")]
    State(&'static str),
    /// Who asks is at fault: there is no such device, or it cannot do that.
    #[error("{0}")]
    Device(String),
    /// The guest has ended meanwhile.
    #[error("The guest has ended")]
    Ended,
    /// The host is at fault. The machine has ended.
    #[error(transparent)]
    Host(#[from] anyhow::Error),
}

/// A machine in either of its states, from its first start to its end.
pub struct Live {
    half: Half,
    started: bool,
    config: VmConfig,
}

enum Half {
    Paused(Paused),
    Running(Running),
    /// What the host refused.
    Lost(String),
}

impl Live {
    /// A machine that was built from `config` and has not started.
    pub fn new(paused: Paused, config: VmConfig) -> Self {
        Self { half: Half::Paused(paused), started: false, config }
    }

    /// Does what is asked.
    ///
    /// # Errors
    ///
    /// See [`ControlError`]. But for [`ControlError::Host`] all is as it was.
    pub fn perform(&mut self, request: ControlRequest) -> Result<ControlReply, ControlError> {
        if self.has_ended() {
            return Err(ControlError::Ended);
        }
        match (request, self.state()) {
            (ControlRequest::Describe, state) => Ok(ControlReply::Description(self.config.name.clone(), state)),
            (ControlRequest::Config, _) => Ok(ControlReply::Config(Box::new(self.config.clone()))),
            (ControlRequest::Start, State::NotStarted) => self.resume(),
            (ControlRequest::Start, _) => Err(ControlError::State("The machine has been started already")),
            (_, State::NotStarted) => Err(ControlError::State("The machine has not been started yet: start it first")),
            // As often as one likes: it is the state that is asked for.
            (ControlRequest::Pause, _) => self.pause(),
            (ControlRequest::Resume, _) => self.resume(),
            (ControlRequest::PressPowerButton, State::Paused) => {
                Err(ControlError::State("The machine is paused and does not hear its power button: resume it first"))
            }
            (ControlRequest::PressPowerButton, _) => {
                if let Half::Running(running) = &self.half {
                    running.press_power_button();
                }
                Ok(ControlReply::Done)
            }
            (ControlRequest::Device(request), _) => {
                let controls = match &self.half {
                    Half::Paused(paused) => paused.controls(),
                    Half::Running(running) => running.controls(),
                    Half::Lost(_) => return Err(ControlError::Ended),
                };
                let reply = controls.perform(request, &mut self.config.devices);
                reply.map(ControlReply::Device).map_err(|error| ControlError::Device(format!("{error:#}")))
            }
        }
    }

    /// What the processors do.
    pub fn state(&self) -> State {
        match (&self.half, self.started) {
            (_, false) => State::NotStarted,
            (Half::Running(_), _) => State::Running,
            _ => State::Paused,
        }
    }

    /// What the machine is, with all that has been changed since its start.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Whether there is nothing left to run.
    pub fn has_ended(&self) -> bool {
        match &self.half {
            Half::Paused(paused) => paused.has_ended(),
            Half::Running(running) => running.has_ended(),
            Half::Lost(_) => true,
        }
    }

    /// Stops the processors and says how the guest ended; `None` where it had not.
    pub fn finish(&mut self) -> Option<Outcome> {
        match &mut self.half {
            Half::Paused(paused) => paused.outcome(),
            Half::Running(running) => running.finish(),
            Half::Lost(why) => Some(Outcome::HostFailure(why.clone())),
        }
    }

    fn pause(&mut self) -> Result<ControlReply, ControlError> {
        self.half = match self.take() {
            Half::Running(running) => Half::Paused(running.pause()),
            other => other,
        };
        Ok(ControlReply::Done)
    }

    fn resume(&mut self) -> Result<ControlReply, ControlError> {
        self.half = match self.take() {
            Half::Paused(paused) => match paused.resume() {
                Ok(running) => Half::Running(running),
                Err(error) => {
                    self.half = Half::Lost(format!("{error:#}"));
                    return Err(error.into());
                }
            },
            other => other,
        };
        self.started = true;
        Ok(ControlReply::Done)
    }

    fn take(&mut self) -> Half {
        std::mem::replace(&mut self.half, Half::Lost(String::new()))
    }
}
