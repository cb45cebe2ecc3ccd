//! The Firecracker API's JSON, as far as it is here: bodies that come in and bodies that go out.
//!
//! Keys that stand for what we have are there, under the schema's names; what it has no name for goes under ours.

use std::path::Path;

use devices::balloon::BalloonSpec;
use devices::block::{BlockSpec, Cache};
use devices::net::NetSpec;
use devices::vsock::VsockSpec;
use devices::{DeviceReply, Devices};
use kv::Size;
use machine::{ControlReply, State, VmConfig};
use memory::HugePages;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::http::Response;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// `PATCH /vm`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vm {
    pub(crate) state: VmState,
}

#[derive(Debug, Deserialize)]
pub(crate) enum VmState {
    Paused,
    Resumed,
}

/// `PUT /actions`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    pub(crate) action_type: ActionType,
}

#[derive(Debug, Deserialize)]
pub(crate) enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// `PATCH /drives/{id}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drive {
    pub(crate) drive_id: String,
    pub(crate) path_on_host: String,
}

/// `PATCH /balloon`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonUpdate {
    pub(crate) amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StatisticsUpdate {
    pub(crate) stats_polling_interval_s: u32,
}

/// `GET /version`: under the name that its clients read, and under ours.
pub(crate) fn version() -> Value {
    json!({ "firecracker_version": VERSION, "vmm_version": VERSION })
}

/// What the machine's replies look like.
pub(crate) fn reply(reply: ControlReply) -> Response {
    match reply {
        ControlReply::Done => Response::DONE,
        ControlReply::Description(name, state) => Response::ok(description(name.as_deref(), state)),
        ControlReply::Config(config) => Response::ok(vm_config(&config)),
        ControlReply::Device(reply) => device_reply(reply),
    }
}

/// What a request for a device gives.
fn device_reply(reply: DeviceReply) -> Response {
    match reply {
        DeviceReply::Done => Response::DONE,
        DeviceReply::Balloon(spec) => Response::ok(balloon(&spec)),
        DeviceReply::BalloonStatistics { target, actual, of_guest } => {
            Response::ok(balloon_statistics(target, actual, of_guest))
        }
    }
}

/// `GET /machine-config`: a part of what the machine is.
pub(crate) fn machine_config_alone(reply: ControlReply) -> Response {
    match reply {
        ControlReply::Config(config) => Response::ok(machine_config(&config)),
        other => self::reply(other),
    }
}

/// `GET /`.
fn description(name: Option<&str>, state: State) -> Value {
    let state = match state {
        State::NotStarted => "Not started",
        State::Running => "Running",
        State::Paused => "Paused",
    };
    json!({ "app_name": "vmm", "id": name.unwrap_or("vmm"), "state": state, "vmm_version": VERSION })
}

/// `GET /vm/config`.
fn vm_config(config: &VmConfig) -> Value {
    let mut all = Map::new();
    let kernel = config.kernel.as_ref();
    let boot_source = json!({
        "kernel_image_path": kernel.map(|kernel| text(&kernel.path)),
        "initrd_path": config.initrd.as_deref().map(text),
        "boot_args": config.cmdline,
    });
    all.insert("boot-source".into(), boot_source);
    all.insert("machine-config".into(), machine_config(config));
    let Devices { disk, net, rng, vsock, balloon, .. } = &config.devices;
    // Those with a place in the schema have it; the rest follow as they are described.
    if let Ok(Value::Object(devices)) = serde_json::to_value(&config.devices) {
        let known = ["disk", "net", "rng", "vsock", "balloon"];
        all.extend(devices.into_iter().filter(|(name, _)| !known.contains(&name.as_str())));
    }
    all.insert("drives".into(), disk.iter().map(drive).collect());
    all.insert("network-interfaces".into(), net.iter().map(network_interface).collect());
    all.insert("entropy".into(), rng.first().map_or(Value::Null, |spec| json!({ "id": spec.id() })));
    all.insert("vsock".into(), vsock.first().map_or(Value::Null, self::vsock));
    all.insert("balloon".into(), balloon.first().map_or(Value::Null, self::balloon));
    Value::Object(all)
}

fn machine_config(config: &VmConfig) -> Value {
    let mem = config.mem.clone().unwrap_or_default();
    let huge_pages = match mem.hugepages {
        HugePages::Off => "None",
        HugePages::Transparent => "Transparent",
        HugePages::Huge2M => "2M",
        HugePages::Huge1G => "1G",
    };
    json!({
        "vcpu_count": config.cpus.clone().unwrap_or_default().count,
        "mem_size_mib": mem.size.bytes() / MIB,
        "smt": false,
        "track_dirty_pages": false,
        "huge_pages": huge_pages,
    })
}

/// JSON has no paths but those that are text.
fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Which disk is the root the kernel's command line says, and only the guest understands.
fn drive(spec: &BlockSpec) -> Value {
    let cache_type = match spec.cache {
        Cache::Writeback => "Writeback",
        Cache::Unsafe => "Unsafe",
    };
    json!({
        "drive_id": spec.id(),
        "is_root_device": false,
        "path_on_host": text(&spec.path),
        "is_read_only": spec.readonly,
        "cache_type": cache_type,
    })
}

fn network_interface(spec: &NetSpec) -> Value {
    json!({ "iface_id": spec.id(), "host_dev_name": spec.tap, "guest_mac": spec.mac, "mtu": spec.mtu })
}

fn vsock(spec: &VsockSpec) -> Value {
    json!({ "guest_cid": spec.cid(), "uds_path": text(&spec.path) })
}

pub(crate) fn balloon(spec: &BalloonSpec) -> Value {
    json!({
        "amount_mib": spec.size.bytes() / MIB,
        "deflate_on_oom": spec.deflate_on_oom,
        "stats_polling_interval_s": spec.stats_interval.unwrap_or(0),
        "free_page_hinting": false,
        "free_page_reporting": spec.free_page_reporting,
    })
}

/// `GET /balloon/statistics`. The guest's own names are those of the schema.
pub(crate) fn balloon_statistics(target: Size, actual: Size, of_guest: Vec<(&'static str, u64)>) -> Value {
    let host = [
        ("target_pages", target.bytes() / PAGE),
        ("actual_pages", actual.bytes() / PAGE),
        ("target_mib", target.bytes() / MIB),
        ("actual_mib", actual.bytes() / MIB),
    ];
    let all = host.into_iter().chain(of_guest).map(|(name, value)| (name.to_owned(), value.into()));
    Value::Object(all.collect())
}
