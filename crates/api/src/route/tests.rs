//! What each request asks for, and what is refused.

use serde_json::{Value, json};

use super::*;
use crate::http;

fn request(method: &str, path: &str, body: &str) -> Request {
    Request { method: method.into(), path: path.into(), body: body.into(), keep_alive: true }
}

fn asked(method: &str, path: &str, body: &str) -> ControlRequest {
    match route(&request(method, path, body), None) {
        Routed::Ask(request, _) => request,
        Routed::Answer(response) => panic!("{method} {path} {body}: {response:?}"),
    }
}

#[track_caller]
fn assert_refused(method: &str, path: &str, body: &str, part: &str) {
    let Routed::Answer(Response { status: 400, body: Some(fault) }) = route(&request(method, path, body), None) else {
        panic!("{method} {path} {body} is not refused");
    };
    let message = fault["fault_message"].as_str().unwrap();
    assert!(message.contains(part), "{method} {path} {body}: {message}");
}

#[test]
fn each_endpoint_asks_for_one_thing() {
    assert!(matches!(asked("GET", "/", ""), ControlRequest::Describe));
    assert!(matches!(asked("GET", "/vm/config", ""), ControlRequest::Config));
    assert!(matches!(asked("GET", "/machine-config", ""), ControlRequest::Config));
    assert!(matches!(asked("PATCH", "/vm", r#"{"state":"Paused"}"#), ControlRequest::Pause));
    assert!(matches!(asked("PATCH", "/vm", r#"{"state":"Resumed"}"#), ControlRequest::Resume));
    let action = |name: &str| asked("PUT", "/actions", &json!({ "action_type": name }).to_string());
    assert!(matches!(action("InstanceStart"), ControlRequest::Start));
    assert!(matches!(action("SendCtrlAltDel"), ControlRequest::PressPowerButton));
    let device = |method, path, body| match asked(method, path, body) {
        ControlRequest::Device(request) => request,
        other => panic!("{other:?}"),
    };
    assert!(matches!(device("GET", "/balloon", ""), DeviceRequest::Balloon));
    assert!(matches!(device("GET", "/balloon/statistics", ""), DeviceRequest::BalloonStatistics));
    let resized = device("PATCH", "/balloon", r#"{"amount_mib":3}"#);
    assert!(matches!(resized, DeviceRequest::ResizeBalloon(Size(0x30_0000))));
    let interval = device("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":7}"#);
    assert!(matches!(interval, DeviceRequest::BalloonInterval(7)));
    let drive = device("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"/b"}"#);
    assert!(matches!(drive, DeviceRequest::ChangeDrive { id, path, file: None } if id == "a" && path == *"/b"));
}

#[test]
fn a_file_goes_with_the_request_for_its_drive_and_with_no_other() {
    let file = || Some(tempfile::tempfile().unwrap());
    let drive = request("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"/b"}"#);
    let routed = route(&drive, file());
    let Routed::Ask(ControlRequest::Device(DeviceRequest::ChangeDrive { file: Some(_), .. }), _) = routed else {
        panic!("the drive has no file");
    };
    assert!(matches!(route(&request("GET", "/", ""), file()), Routed::Ask(ControlRequest::Describe, _)));
}

#[test]
fn unknown_paths_and_methods_are_refused_as_firecracker_does() {
    for (method, path) in [
        ("GET", "/vm"),
        ("GET", "/vm/config/"),
        ("GET", ""),
        ("GET", "//"),
        ("DELETE", "/drives/a"),
        ("POST", "/actions"),
        ("get", "/"),
    ] {
        assert_refused(method, path, "", "Invalid request method and/or path");
    }
    assert_refused("PUT", "/boot-source", "{}", "Invalid request method and/or path: PUT /boot-source");
    assert_refused("PATCH", "/drives", "{}", "Invalid request method and/or path");
}

#[test]
fn a_body_where_none_belongs_and_none_where_one_does_are_refused() {
    assert_refused("GET", "/", "{}", "no body");
    assert_refused("PUT", "/actions", "", "has a body");
    assert_refused("PATCH", "/vm", "", "has a body");
}

#[test]
fn a_body_that_is_wrong_is_refused_with_what_is_wrong() {
    for (method, path, body, part) in [
        ("PATCH", "/vm", "{", "EOF"),
        ("PATCH", "/vm", "{}", "state"),
        ("PATCH", "/vm", r#"{"state":"Paused","now":true}"#, "now"),
        ("PATCH", "/vm", r#"{"state":"paused"}"#, "Paused"),
        ("PATCH", "/vm", r#"{"state":"Paused"} x"#, "trailing"),
        ("PATCH", "/vm", r#""Paused""#, "body"),
        ("PATCH", "/vm", "\u{ff}", "expected"),
        ("PUT", "/actions", r#"{"action_type":"Explode"}"#, "SendCtrlAltDel"),
        ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#, "no metrics"),
        ("PATCH", "/balloon", r#"{"amount_mib":-1}"#, "-1"),
        ("PATCH", "/balloon", r#"{"amount_mib":4294967296}"#, "4294967296"),
        ("PATCH", "/drives/a", r#"{"drive_id":"b","path_on_host":"/c"}"#, "say the same"),
        ("PATCH", "/drives/a", r#"{"drive_id":"a"}"#, "path_on_host"),
        ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":""}"#, "name a file"),
        ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"\u0000"}"#, "zero byte"),
        ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"/c","rate_limiter":{}}"#, "rate_limiter"),
    ] {
        assert_refused(method, path, body, part);
    }
    let deep = "[".repeat(http::MOST_BODY);
    assert_refused("PATCH", "/vm", &deep, "body is wrong");
}

#[test]
fn a_refusal_is_400_where_the_client_is_at_fault_and_500_where_the_host_is() {
    let status = |error| respond(Err(error), schema::reply).status;
    assert_eq!(status(ControlError::State("no")), 400);
    assert_eq!(status(ControlError::Device("no".into())), 400);
    assert_eq!(status(ControlError::Ended), 503);
    assert_eq!(status(ControlError::Host(std::io::Error::from_raw_os_error(11).into())), 500);
}

/// A machine's description, as its file has it.
fn config(toml: Value) -> ControlReply {
    ControlReply::Config(Box::new(serde_json::from_value(toml).unwrap()))
}

#[test]
fn a_machine_is_told_in_the_schemas_words() {
    let reply = config(json!({
        "kernel": "bzImage",
        "cmdline": "quiet",
        "mem": "1G",
        "cpus": "2",
        "disk": ["/srv/root.img", "b,readonly,id=x"],
        "net": ["tap0,mac=02:00:00:00:00:07"],
        "rng": "",
        "vsock": "/run/v",
        "balloon": "64M,stats-interval=5",
    }));
    let body = schema::reply(reply).body.unwrap();
    assert_eq!(body["boot-source"]["kernel_image_path"], "bzImage");
    assert_eq!(body["boot-source"]["boot_args"], "quiet");
    assert_eq!(
        (&body["machine-config"]["vcpu_count"], &body["machine-config"]["mem_size_mib"]),
        (&json!(2), &json!(1024))
    );
    assert_eq!(body["drives"][0]["drive_id"], "root");
    assert_eq!(body["drives"][0]["path_on_host"], "/srv/root.img");
    assert_eq!((&body["drives"][1]["drive_id"], &body["drives"][1]["is_read_only"]), (&json!("x"), &json!(true)));
    assert_eq!(body["network-interfaces"][0]["host_dev_name"], "tap0");
    assert_eq!(body["network-interfaces"][0]["guest_mac"], "02:00:00:00:00:07");
    assert_eq!(body["vsock"]["guest_cid"], 3);
    assert_eq!(body["balloon"]["amount_mib"], 64);
    assert_eq!(body["balloon"]["stats_polling_interval_s"], 5);
    assert_eq!(body["entropy"]["id"], "rng");
    assert!(["disk", "net", "rng"].iter().all(|name| body.get(name).is_none()));
}

#[test]
fn a_machine_without_devices_has_empty_lists() {
    let body = schema::reply(config(json!({}))).body.unwrap();
    assert_eq!((&body["drives"], &body["balloon"]), (&json!([]), &Value::Null));
    let alone = schema::machine_config_alone(config(json!({}))).body.unwrap();
    assert_eq!(alone, body["machine-config"]);
    assert_eq!((&alone["vcpu_count"], &alone["mem_size_mib"]), (&json!(1), &json!(512)));
}
