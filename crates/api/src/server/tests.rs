//! The server with a stand-in for the machine, and clients of every kind.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use devices::DeviceRequest;
use machine::State;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::client::{Answer, Client, ClientError};

/// Only a failing test waits so long.
const LONG: Duration = Duration::from_secs(60);
const GET: &str = "GET /version HTTP/1.1\r\n\r\n";

/// A server, and a thread that answers for a machine.
struct Rig {
    folder: TempDir,
    stop: Option<(Sender<()>, JoinHandle<Server>)>,
}

impl Rig {
    /// A machine that has been paused, and says which files it is sent.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::listen(&folder.path().join("socket"), || ()).unwrap();
        let (stop, stopped) = channel();
        let machine = move || {
            while stopped.try_recv().is_err() {
                match server.calls.recv_timeout(Duration::from_millis(5)) {
                    Ok(call) => call.answer(stand_in),
                    Err(_) => continue,
                }
            }
            server
        };
        Self { folder, stop: Some((stop, std::thread::spawn(machine))) }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap()
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// The machine answers no more.
    fn stop(&mut self) -> Server {
        let (stop, thread) = self.stop.take().unwrap();
        stop.send(()).unwrap();
        thread.join().unwrap()
    }
}

fn stand_in(request: ControlRequest) -> Result<ControlReply, ControlError> {
    match request {
        ControlRequest::Describe => Ok(ControlReply::Description(Some("one".into()), State::Paused)),
        ControlRequest::Device(DeviceRequest::ChangeDrive { file, .. }) => {
            let mut text = String::new();
            let read = file.map(|mut file| file.read_to_string(&mut text).unwrap());
            Err(ControlError::Device(read.map_or("no file".into(), |_| text)))
        }
        ControlRequest::Start => Err(ControlError::State("it runs")),
        _ => Ok(ControlReply::Done),
    }
}

fn drive(client: &mut Client, file: Option<&File>) -> Answer {
    let body = r#"{"drive_id":"a","path_on_host":"/b"}"#;
    client.ask("PATCH", "/drives/a", Some(body), file.map(File::as_fd)).unwrap()
}

fn file_with(text: &str) -> File {
    use std::io::Seek;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // Closed with bytes unread.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => drop(other.unwrap()),
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_client_is_answered_again_and_again_over_one_connection() {
    let rig = Rig::new();
    let mut client = rig.client();
    for _ in 0..3 {
        let answer = client.ask("GET", "/", None, None).unwrap();
        assert_eq!((answer.status, &answer.body.unwrap()["state"]), (200, &json!("Paused")));
        let paused = client.ask("PATCH", "/vm", Some(r#"{"state":"Paused"}"#), None).unwrap();
        assert_eq!(paused, Answer { status: 204, body: None });
    }
    let started = client.ask("PUT", "/actions", Some(r#"{"action_type":"InstanceStart"}"#), None).unwrap();
    assert_eq!((started.status, started.fault()), (400, Some("it runs")));
}

#[test]
fn only_the_user_may_connect_and_the_socket_goes_with_its_server() {
    let mut rig = Rig::new();
    assert_eq!(fs::metadata(rig.path()).unwrap().permissions().mode() & 0o777, 0o600);
    drop(rig.stop());
    assert!(!rig.path().exists());
    assert!(matches!(Client::connect(&rig.path()), Err(ClientError::Connect { .. })));
}

#[test]
fn a_live_socket_is_refused_and_a_dead_one_replaced() {
    let rig = Rig::new();
    let refused = Server::listen(&rig.path(), || ()).err().unwrap().to_string();
    assert!(refused.contains("in use") && refused.contains("--api-socket"), "{refused}");
    rig.client().ask("GET", "/", None, None).unwrap();
    let dead = rig.folder.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    let server = Server::listen(&dead, || ()).unwrap();
    UnixStream::connect(&dead).unwrap();
    drop(server);
    assert!(!dead.exists());
    fs::write(&dead, "precious").unwrap();
    assert!(Server::listen(&dead, || ()).err().unwrap().to_string().contains("is no socket"));
    assert_eq!(fs::read(&dead).unwrap(), b"precious");
}

#[test]
fn a_socket_that_another_has_put_in_its_place_is_left_alone() {
    let mut rig = Rig::new();
    fs::remove_file(rig.path()).unwrap();
    let _other = UnixListener::bind(rig.path()).unwrap();
    drop(rig.stop());
    assert!(rig.path().exists());
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let rig = Rig::new();
    let mut stream = rig.stream();
    // The first waits for the machine, the second does not, the third ends the connection.
    let text = format!(
        "GET / HTTP/1.1\r\n\r\n{GET}PUT /x HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}{GET}"
    );
    stream.write_all(text.as_bytes()).unwrap();
    let answers = read_all(&mut stream);
    let at = |part: &str| answers.find(part).unwrap_or_else(|| panic!("no {part} in {answers}"));
    assert!(at("Paused") < at("firecracker_version") && at("firecracker_version") < at("PUT /x"), "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 3, "{answers}");
}

#[test]
fn a_request_that_comes_byte_by_byte_is_answered() {
    let rig = Rig::new();
    let mut stream = rig.stream();
    let text = "PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\nConnection: close\r\n\r\n{\"state\":\"Paused\"}";
    for byte in text.as_bytes() {
        stream.write_all(&[*byte]).unwrap();
    }
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 204"));
}

#[test]
fn a_client_that_has_said_all_it_has_to_is_answered_still() {
    let rig = Rig::new();
    let mut stream = rig.stream();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut stream).contains("Paused"));
}

#[test]
fn what_makes_no_sense_is_answered_with_400_and_the_connection_closed() {
    let rig = Rig::new();
    for text in ["nonsense\r\n\r\n", "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", &"x".repeat(9000)] {
        let mut stream = rig.stream();
        stream.write_all(text.as_bytes()).unwrap();
        let answer = read_all(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("fault_message"), "{answer}");
    }
    let mut stream = rig.stream();
    stream.write_all(b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n").unwrap();
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 413"));
}

#[test]
fn the_largest_request_fits() {
    let rig = Rig::new();
    let body = format!("{:51200}", r#"{"state":"Paused"}"#);
    let answer = rig.client().ask("PATCH", "/vm", Some(&body), None).unwrap();
    assert_eq!(answer.status, 204);
}

#[test]
fn a_file_comes_with_its_request() {
    let rig = Rig::new();
    let mut client = rig.client();
    for text in ["first", "second"] {
        assert_eq!(drive(&mut client, Some(&file_with(text))).fault(), Some(text));
    }
    assert_eq!(drive(&mut client, None).fault(), Some("no file"));
}

#[test]
fn a_file_that_no_request_wants_is_closed() {
    let rig = Rig::new();
    let (mut end, file) = io::pipe().unwrap();
    let mut client = rig.client();
    client.ask("GET", "/", None, Some(file.as_fd())).unwrap();
    drop(file);
    // The end of the pipe is seen once its last writer is gone.
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
    assert_eq!(drive(&mut client, None).fault(), Some("no file"));
}

#[test]
fn of_pipelined_requests_each_has_its_own_file() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let rig = Rig::new();
    let mut stream = rig.stream();
    let request = |more: &str| {
        let body = r#"{"drive_id":"a","path_on_host":"/b"}"#;
        format!("PATCH /drives/a HTTP/1.1\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    stream.write_all(request("").as_bytes()).unwrap();
    let file = file_with("the second's");
    let files = [file.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let text = request("Connection: close\r\n");
    sendmsg(&stream, &[io::IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty()).unwrap();
    let answers = read_all(&mut stream);
    let (first, second) = answers.split_once("}HTTP").unwrap();
    assert!(first.contains("no file") && second.contains("the second's"), "{answers}");
}

#[test]
fn more_than_one_file_is_refused() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let rig = Rig::new();
    for count in [2, 5] {
        let mut stream = rig.stream();
        let files: Vec<File> = (0..count).map(|_| file_with("x")).collect();
        let files: Vec<_> = files.iter().map(File::as_fd).collect();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(&stream, &[io::IoSlice::new(GET.as_bytes())], &mut control, SendFlags::empty()).unwrap();
        assert!(read_all(&mut stream).contains("one descriptor at most"));
    }
}

#[test]
fn clients_that_stall_keep_nobody_else_waiting() {
    let rig = Rig::new();
    let mut stalled: Vec<UnixStream> = (0..5).map(|_| rig.stream()).collect();
    for stream in &mut stalled {
        stream.write_all(b"GET / HT").unwrap();
    }
    // One that asks and asks, and never reads.
    let mut deaf = rig.stream();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(GET.repeat(100).as_bytes()).is_ok() {}
    assert_eq!(rig.client().ask("GET", "/", None, None).unwrap().status, 200);
}

#[test]
fn a_newcomer_takes_the_place_of_the_idlest_and_none_from_the_busy() {
    let rig = Rig::new();
    let mut clients: Vec<Client> = (0..MOST_CONNECTIONS).map(|_| rig.client()).collect();
    for client in &mut clients {
        client.ask("GET", "/", None, None).unwrap();
    }
    assert_eq!(rig.client().ask("GET", "/", None, None).unwrap().status, 200);
    assert!(clients[0].ask("GET", "/", None, None).is_err(), "it was the idlest");
    assert_eq!(clients[1].ask("GET", "/", None, None).unwrap().status, 200);
    drop(clients);
    let mut busy: Vec<UnixStream> = (0..MOST_CONNECTIONS).map(|_| rig.stream()).collect();
    for stream in &mut busy {
        // What has been answered has been read, together with the beginning of the next.
        stream.write_all(format!("{GET}GET / HT").as_bytes()).unwrap();
        assert!(stream.read(&mut [0; 12]).unwrap() > 0);
    }
    assert!(read_all(&mut rig.stream()).starts_with("HTTP/1.1 503"));
    busy[0].write_all(b"TP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    assert!(read_all(&mut busy[0]).contains("Paused"));
    assert_eq!(rig.client().ask("GET", "/", None, None).unwrap().status, 200);
}

#[test]
fn a_client_that_takes_too_long_for_its_request_is_dropped() {
    let rig = Rig::new();
    let mut stream = rig.stream();
    let start = Instant::now();
    stream.write_all(b"GET / HT").unwrap();
    assert_eq!(read_all(&mut stream), "");
    assert!(start.elapsed() >= Duration::from_secs(9), "{:?}", start.elapsed());
}

#[test]
fn a_client_that_leaves_before_its_answer_is_not_missed() {
    let mut rig = Rig::new();
    let server = rig.stop();
    let mut stream = rig.stream();
    stream.write_all(b"PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}").unwrap();
    drop(stream);
    let call = server.calls.recv_timeout(LONG).unwrap();
    assert!(matches!(call.request, ControlRequest::Pause), "what it asked for is done");
    call.answer(stand_in);
    let mut next = rig.stream();
    next.write_all(GET.as_bytes()).unwrap();
    assert!(next.read(&mut [0; 12]).unwrap() > 0);
}

#[test]
fn a_machine_that_ends_closes_the_connection_of_who_waits_for_it() {
    let mut rig = Rig::new();
    let server = rig.stop();
    let mut client = rig.client();
    let asking = std::thread::spawn(move || client.ask("GET", "/", None, None));
    let _call = server.calls.recv_timeout(LONG).unwrap();
    drop(server);
    assert!(matches!(asking.join().unwrap(), Err(ClientError::Closed(_))));
}

#[test]
fn a_stranger_s_socket_is_told_from_a_control_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let stranger = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        let _ = stream.read(&mut [0; 4096]);
    });
    let answer = Client::connect(&path).unwrap().ask("GET", "/", None, None);
    assert!(matches!(answer, Err(ClientError::Stranger(_))), "{answer:?}");
    stranger.join().unwrap();
}
