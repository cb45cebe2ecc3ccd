//! Requests as clients write them, and as adversaries do.

use super::*;

fn whole(text: &str) -> Request {
    match parse(text.as_bytes()) {
        Ok(Parsed::Complete(request, length)) => {
            assert_eq!(length, text.len());
            request
        }
        other => panic!("{text:?} is {other:?}"),
    }
}

fn fault(bytes: &[u8]) -> (u16, String) {
    let fault = parse(bytes).unwrap_err();
    (fault.status, fault.message)
}

const PATCH: &str = "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";

#[test]
fn a_request_is_its_method_path_and_body() {
    let request = whole(PATCH);
    assert_eq!((request.method.as_str(), request.path.as_str()), ("PATCH", "/vm"));
    assert_eq!((request.body.as_slice(), request.keep_alive), (&b"{\"state\":\"Paused\"}"[..], true));
}

#[test]
fn a_request_that_is_split_anywhere_is_waited_for_and_read_alike() {
    for split in 0..PATCH.len() {
        let Ok(Parsed::Incomplete { needed, .. }) = parse(&PATCH.as_bytes()[..split]) else {
            panic!("{split} bytes are no request");
        };
        assert!(split < needed && needed <= PATCH.len(), "{split}: {needed}");
    }
    let Ok(Parsed::Incomplete { needed, .. }) = parse(&PATCH.as_bytes()[..PATCH.len() - 10]) else {
        panic!("the body is not there");
    };
    assert_eq!(needed, PATCH.len());
}

#[test]
fn of_pipelined_requests_the_first_is_read() {
    let both = format!("{PATCH}GET / HTTP/1.1\r\n\r\n");
    let Ok(Parsed::Complete(request, length)) = parse(both.as_bytes()) else { panic!("there are two") };
    assert_eq!((request.path.as_str(), length), ("/vm", PATCH.len()));
}

#[test]
fn a_connection_stays_unless_the_client_says_otherwise() {
    assert!(whole("GET / HTTP/1.1\r\n\r\n").keep_alive);
    assert!(!whole("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").keep_alive);
    assert!(!whole("GET / HTTP/1.1\r\nConnection: x, close\r\n\r\n").keep_alive);
    assert!(!whole("GET / HTTP/1.0\r\n\r\n").keep_alive);
    assert!(whole("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive);
}

#[test]
fn a_client_that_expects_it_is_told_to_go_on() {
    let head = "PUT /actions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n";
    let expected = Parsed::Incomplete { needed: head.len() + 9, expects_continue: true };
    assert_eq!(parse(head.as_bytes()), Ok(expected));
}

#[test]
fn a_path_is_read_without_host_query_and_percent_signs() {
    for (target, path) in [
        ("/vm/config?x=1", "/vm/config"),
        ("http://localhost/vm", "/vm"),
        ("http://localhost", "/"),
        ("/drives/a%20%C3%A4%2Fb", "/drives/a ä/b"),
    ] {
        assert_eq!(whole(&format!("GET {target} HTTP/1.1\r\n\r\n")).path, path);
    }
    for target in ["/%", "/%4", "/%zz", "/%ff"] {
        let (status, message) = fault(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes());
        assert!(status == 400 && message.contains(target), "{message}");
    }
}

#[test]
fn any_name_survives_in_a_path() {
    for name in ["root", "a b/c%d?e#f", "ä\u{1f41f}", ""] {
        assert_eq!(whole(&format!("GET /drives/{} HTTP/1.1\r\n\r\n", encode(name))).path, format!("/drives/{name}"));
    }
}

#[test]
fn a_head_has_its_limits() {
    let long = |length: usize| {
        let start = "GET / HTTP/1.1\r\nX: ";
        format!("{start}{}\r\n\r\n", "x".repeat(length - start.len() - 4))
    };
    whole(&long(MOST_HEAD));
    for length in [MOST_HEAD + 1, 2 * MOST_HEAD] {
        assert!(fault(long(length).as_bytes()).1.contains("8192"));
    }
    assert!(fault(&vec![b'x'; MOST_HEAD]).1.contains("8192"), "an endless method");
    let many: String = (0..=MOST_HEADERS).map(|number| format!("X{number}: 1\r\n")).collect();
    assert!(fault(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()).1.contains("64 headers"));
}

#[test]
fn a_body_has_its_limit_before_it_comes() {
    let head = |length: &str| format!("PUT /actions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    assert!(matches!(parse(head("51200").as_bytes()), Ok(Parsed::Incomplete { .. })));
    for length in ["51201", "4294967296", "99999999999999999999999999"] {
        assert_eq!(fault(head(length).as_bytes()).0, 413, "{length}");
    }
}

#[test]
fn a_length_that_can_be_understood_in_two_ways_is_refused() {
    for headers in [
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 1, 1",
        "Content-Length: 0x1",
        "Content-Length:",
        "Transfer-Encoding: chunked",
        "Content-Length: 1\r\nTransfer-Encoding: identity",
    ] {
        let (status, message) = fault(format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\nx").as_bytes());
        assert!(status == 400 && message.contains("Content-Length"), "{headers}: {message}");
    }
}

#[test]
fn what_is_no_http_is_refused() {
    for bytes in
        [&b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"[..], b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"{}\r\n\r\n"]
    {
        assert_eq!(fault(bytes).0, 400, "{bytes:?}");
    }
}

#[test]
fn no_bytes_make_it_panic_or_promise_too_much() {
    // A xorshift generator: the same bytes each time.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut bytes = PATCH.as_bytes().to_vec();
        for _ in 0..random() % 4 + 1 {
            let at = usize::try_from(random() % PATCH.len() as u64).unwrap();
            bytes[at] = random().to_le_bytes()[0];
        }
        match parse(&bytes) {
            Ok(Parsed::Complete(_, length)) => assert!(length <= bytes.len()),
            Ok(Parsed::Incomplete { needed, .. }) => {
                assert!(bytes.len() < needed && needed <= MOST_HEAD + MOST_BODY, "{needed}");
            }
            Err(fault) => assert!([400, 413].contains(&fault.status)),
        }
    }
}

#[test]
fn a_response_has_a_body_and_its_length_or_neither() {
    let text = |response: &Response, keep_alive| {
        let mut bytes = Vec::new();
        response.write(&mut bytes, keep_alive);
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(text(&Response::DONE, true), "HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n");
    let fault = text(&Response::fault(400, "no \"such\""), false);
    let body = r#"{"fault_message":"no \"such\""}"#;
    assert!(fault.starts_with("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n"), "{fault}");
    assert!(fault.ends_with(&format!("Content-Length: {}\r\n\r\n{body}", body.len())), "{fault}");
}
