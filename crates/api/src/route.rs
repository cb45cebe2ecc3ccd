//! From a request to what is asked of the machine, and from its reply to a response.

use std::fs::File;
use std::path::PathBuf;

use devices::DeviceRequest;
use kv::Size;
use machine::{ControlError, ControlReply, ControlRequest};
use serde::de::DeserializeOwned;

use crate::http::{Request, Response};
use crate::schema;

/// What a request comes to.
pub(crate) enum Routed {
    /// It is answered at once.
    Answer(Response),
    /// The machine is asked, and its reply is made a response of by this.
    Ask(ControlRequest, Render),
}

/// Makes a response of what the machine has replied.
pub(crate) type Render = fn(ControlReply) -> Response;

/// Finds out what a request asks for. `file` came with it; where no request wants it, it is closed.
pub(crate) fn route(request: &Request, file: Option<File>) -> Routed {
    try_route(request, file).unwrap_or_else(|message| Routed::Answer(Response::fault(400, &message)))
}

fn try_route(request: &Request, file: Option<File>) -> Result<Routed, String> {
    let Request { method, path, body, .. } = request;
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match method.as_str() {
        "GET" if !body.is_empty() => return Err("A GET request has no body: drop it".into()),
        "PUT" | "PATCH" if body.is_empty() => return Err(format!("A {method} request has a body: give it one")),
        _ => {}
    }
    let device = |request| Ok(Routed::Ask(ControlRequest::Device(request), schema::reply));
    match (method.as_str(), &parts[..]) {
        ("GET", [""]) => Ok(Routed::Ask(ControlRequest::Describe, schema::reply)),
        ("GET", ["version"]) => Ok(Routed::Answer(Response::ok(schema::version()))),
        ("GET", ["vm", "config"]) => Ok(Routed::Ask(ControlRequest::Config, schema::reply)),
        ("GET", ["machine-config"]) => Ok(Routed::Ask(ControlRequest::Config, schema::machine_config_alone)),
        ("PATCH", ["vm"]) => {
            let request = match read::<schema::Vm>(body)?.state {
                schema::VmState::Paused => ControlRequest::Pause,
                schema::VmState::Resumed => ControlRequest::Resume,
            };
            Ok(Routed::Ask(request, schema::reply))
        }
        ("PUT", ["actions"]) => match read::<schema::Action>(body)?.action_type {
            schema::ActionType::InstanceStart => Ok(Routed::Ask(ControlRequest::Start, schema::reply)),
            schema::ActionType::SendCtrlAltDel => Ok(Routed::Ask(ControlRequest::PressPowerButton, schema::reply)),
            schema::ActionType::FlushMetrics => Err("There are no metrics to flush".into()),
        },
        ("PATCH", ["drives", id]) => {
            let drive = read::<schema::Drive>(body)?;
            if drive.drive_id != *id {
                return Err(format!("The path names the drive {id}, and the body {}: say the same", drive.drive_id));
            }
            device(DeviceRequest::ChangeDrive { id: drive.drive_id, path: path_of(drive.path_on_host)?, file })
        }
        ("GET", ["balloon"]) => device(DeviceRequest::Balloon),
        ("PATCH", ["balloon"]) => {
            let mib = read::<schema::BalloonUpdate>(body)?.amount_mib;
            device(DeviceRequest::ResizeBalloon(Size(u64::from(mib) << 20)))
        }
        ("GET", ["balloon", "statistics"]) => device(DeviceRequest::BalloonStatistics),
        ("PATCH", ["balloon", "statistics"]) => {
            device(DeviceRequest::BalloonInterval(read::<schema::StatisticsUpdate>(body)?.stats_polling_interval_s))
        }
        _ => Err(format!("Invalid request method and/or path: {method} {path}")),
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| format!("The body is wrong: {error}"))
}

fn path_of(text: String) -> Result<PathBuf, String> {
    match text.is_empty() || text.contains('\0') {
        true => Err("path_on_host is empty, or holds a zero byte: name a file".into()),
        false => Ok(text.into()),
    }
}

/// The response to what the machine says, by who is at fault.
pub(crate) fn respond(result: Result<ControlReply, ControlError>, render: Render) -> Response {
    match result {
        Ok(reply) => render(reply),
        Err(error @ (ControlError::State(_) | ControlError::Device(_))) => Response::fault(400, &error.to_string()),
        Err(error @ ControlError::Ended) => Response::fault(503, &error.to_string()),
        Err(ControlError::Host(error)) => Response::fault(500, &format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests;
