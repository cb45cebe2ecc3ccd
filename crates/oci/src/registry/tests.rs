//! A registry on this host that behaves as it is told.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use oci_client::secrets::RegistryAuth;
use serde_json::json;

use super::*;
use crate::testing::{Item, image_of, layer_of};

/// Short, for a registry on this host.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(10),
    silence: Duration::from_millis(500),
    manifest: Duration::from_secs(2),
    pause: Duration::from_millis(1),
    tries: 4,
};

/// What a client asks for.
#[derive(Clone, Debug, Default)]
struct Request {
    path: String,
    /// Where the range begins that it wants.
    from: usize,
    authorization: Option<String>,
}

/// What it is answered.
enum Reply {
    Status(u16, &'static str),
    Challenge(String),
    /// All of it, whatever part was wanted.
    Whole(Vec<u8>),
    /// The part that was wanted.
    Part(Vec<u8>),
    /// The part that was wanted, but no more than so many bytes of it.
    Broken(Vec<u8>, usize),
    /// Nothing, for ever.
    Silence,
}

/// The registry: `127.0.0.1:PORT/name:v1`, and what it was asked for.
struct Served {
    name: Reference,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Served {
    fn new(answer: impl Fn(&Request, usize) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::<Request>::new()));
        let log = asked.clone();
        thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(request) = read(&stream) else { continue };
                let before = log.lock().unwrap().iter().filter(|other| other.path == request.path).count();
                log.lock().unwrap().push(request.clone());
                // A client that has heard enough is no fault.
                let _ = send(&mut stream, &request, answer(&request, before)).map(|keep| {
                    if keep {
                        silent.push(stream);
                    }
                });
            }
        });
        Self { name: format!("127.0.0.1:{port}/name:v1").parse().unwrap(), asked }
    }

    /// Serves an image with this layer. `answer` may answer something else.
    fn image(layer: Vec<u8>, answer: impl Fn(&Request, usize, &[u8]) -> Option<Reply> + Send + 'static) -> Self {
        let (blobs, descriptor) = image_of(&[layer], &json!({ "Cmd": ["true"] }));
        let index = json!({ "manifests": [
            { "digest": Digest::of(b"").to_string(), "size": 0, "platform": { "os": "linux", "architecture": "arm64" } },
            { "digest": descriptor["digest"], "size": descriptor["size"],
              "platform": { "os": "linux", "architecture": "amd64" } },
        ] });
        let mut all: HashMap<String, Vec<u8>> =
            blobs.into_iter().map(|blob| (Digest::of(&blob).to_string(), blob)).collect();
        all.insert("v1".to_owned(), index.to_string().into_bytes());
        Self::new(move |request, before| {
            let blob = request.path.rsplit('/').next().and_then(|name| all.get(name));
            match blob {
                Some(blob) => answer(request, before, blob).unwrap_or_else(|| Reply::Part(blob.clone())),
                None if request.path == "/v2/" => Reply::Status(200, ""),
                None => Reply::Status(404, ""),
            }
        })
    }

    fn registry(&self, auth: RegistryAuth) -> Registry {
        Registry::with(&self.name, Login { auth, hint: "the hint".to_owned() }, PATIENCE).unwrap()
    }

    /// Fetches the image's manifest and configuration, and then its layer.
    fn fetch(&self) -> anyhow::Result<Vec<u8>> {
        let registry = self.registry(RegistryAuth::Anonymous);
        let image = registry.image()?;
        let claim = image.layers[0].claim;
        let mut bytes = Vec::new();
        registry.fetch(&claim, None)?.read_to_end(&mut bytes)?;
        blob::read(&*bytes, &claim, u64::MAX)
    }

    fn error(&self) -> String {
        format!("{:#}", self.fetch().unwrap_err())
    }

    /// Where the ranges began that were asked for of the layer.
    fn ranges(&self, layer: &[u8]) -> Vec<usize> {
        let digest = Digest::of(layer).to_string();
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|request| request.path.ends_with(&digest)).map(|request| request.from).collect()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, ..Request::default() };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.from = value.strip_prefix("bytes=")?.split('-').next()?.parse().ok()?,
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(request)
}

/// Sends the reply. Returns whether the connection is to stay open.
fn send(stream: &mut TcpStream, request: &Request, reply: Reply) -> std::io::Result<bool> {
    let head = |status: u16, more: &str, length: usize| {
        format!("HTTP/1.1 {status} said\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n")
    };
    let part = |blob: &[u8]| blob.get(request.from..).unwrap_or_default().to_vec();
    match reply {
        Reply::Status(status, body) => stream.write_all((head(status, "", body.len()) + body).as_bytes())?,
        Reply::Challenge(text) => {
            stream.write_all(head(401, &format!("WWW-Authenticate: {text}\r\n"), 0).as_bytes())?;
        }
        Reply::Whole(blob) => stream.write_all(&[head(200, "", blob.len()).into_bytes(), blob].concat())?,
        Reply::Part(blob) if request.path.contains("/manifests/") => {
            stream.write_all(&[head(200, "", blob.len()).into_bytes(), blob].concat())?;
        }
        Reply::Part(blob) => {
            let part = part(&blob);
            stream.write_all(&[head(206, "", part.len()).into_bytes(), part].concat())?;
        }
        Reply::Broken(blob, most) => {
            let part = part(&blob);
            stream.write_all(head(206, "", part.len()).as_bytes())?;
            stream.write_all(&part[..part.len().min(most)])?;
        }
        Reply::Silence => return Ok(true),
    }
    Ok(false)
}

fn layer() -> Vec<u8> {
    layer_of(&[Item::file("file", &[7; 10_000])])
}

fn is_layer(blob: &[u8]) -> bool {
    blob.len() > 10_000
}

#[test]
fn an_image_for_this_machine_is_fetched_whole() {
    let served = Served::image(layer(), |_, _, _| None);
    assert_eq!(served.fetch().unwrap(), layer());
}

#[test]
fn a_registry_that_fails_twice_is_asked_again() {
    let served = Served::image(layer(), |_, before, _| (before < 2).then_some(Reply::Status(500, "oh")));
    assert_eq!(served.fetch().unwrap(), layer());
}

#[test]
fn a_registry_that_always_fails_is_given_up() {
    let served = Served::image(layer(), |_, _, blob| is_layer(blob).then_some(Reply::Status(503, "oh")));
    let error = served.error();
    assert!(error.contains("given up after 4 tries") && error.contains("503"), "{error}");
    assert_eq!(served.ranges(&layer()).len(), 4);
}

#[test]
fn a_transfer_that_stops_in_the_middle_goes_on_where_it_stopped() {
    let broken = |_: &Request, before: usize, blob: &[u8]| {
        (before < 3).then(|| Reply::Broken(blob.to_vec(), 3000)).filter(|_| is_layer(blob))
    };
    let served = Served::image(layer(), broken);
    assert_eq!(served.fetch().unwrap(), layer());
    assert_eq!(served.ranges(&layer()), [0, 3000, 6000, 9000]);
}

#[test]
fn a_registry_that_knows_no_ranges_begins_again() {
    let answer = |_: &Request, before: usize, blob: &[u8]| {
        is_layer(blob)
            .then(|| if before == 0 { Reply::Broken(blob.to_vec(), 3000) } else { Reply::Whole(blob.to_vec()) })
    };
    let served = Served::image(layer(), answer);
    assert_eq!(served.fetch().unwrap(), layer());
    assert_eq!(served.ranges(&layer()), [0, 3000]);
}

#[test]
fn a_registry_that_hangs_is_not_waited_for_for_ever() {
    let start = Instant::now();
    let error = Served::image(layer(), |_, _, blob| is_layer(blob).then_some(Reply::Silence)).error();
    assert!(error.contains("given up after 4 tries"), "{error}");
    let error = Served::new(|_, _| Reply::Silence).error();
    assert!(error.contains("cannot fetch the manifest") && error.contains("given up"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn what_has_another_digest_or_size_than_was_said_is_refused() {
    let with = |change: fn(&mut Vec<u8>)| {
        let answer = move |_: &Request, _: usize, blob: &[u8]| {
            let mut other = blob.to_vec();
            is_layer(blob).then(|| {
                change(&mut other);
                Reply::Part(other)
            })
        };
        Served::image(layer(), answer).error()
    };
    let error = with(|blob| blob[600] ^= 1);
    assert!(error.contains("its digest is"), "{error}");
    let error = with(|blob| blob.push(0));
    assert!(error.contains("more than the"), "{error}");
    let error = with(|blob| blob.truncate(5000));
    assert!(error.contains("stopped after 5000"), "{error}");
    // The index says which manifest it means.
    let other = |request: &Request, _: usize, _: &[u8]| {
        (request.path.contains("/manifests/sha256")).then(|| Reply::Whole(b"{}".to_vec()))
    };
    let error = Served::image(layer(), other).error();
    assert!(error.contains("cannot fetch the manifest") && error.to_lowercase().contains("digest"), "{error}");
}

#[test]
fn a_missing_image_and_a_manifest_that_is_none_are_refused_at_once() {
    let served = Served::new(|request, _| Reply::Status(if request.path == "/v2/" { 200 } else { 404 }, ""));
    assert!(served.error().contains("no such image"), "{}", served.error());
    let served = Served::new(|_, _| Reply::Status(200, "<html>"));
    assert!(served.error().contains("not understood"), "{}", served.error());
    let served = Served::new(|_, _| Reply::Whole(vec![b' '; 5 << 20]));
    assert!(served.error().contains("more than 4194304 bytes"), "{}", served.error());
}

#[test]
fn a_registry_that_asks_for_a_login_is_given_it_and_nobody_else_is() {
    let basic = || RegistryAuth::Basic("me".to_owned(), "secret".to_owned());
    let answer = |request: &Request, _: usize, blob: &[u8]| match request.authorization.as_deref() {
        Some("Basic bWU6c2VjcmV0") => Some(Reply::Part(blob.to_vec())),
        _ => Some(Reply::Status(401, "")),
    };
    let (blobs, descriptor) = image_of(&[layer()], &json!({}));
    let manifest = blobs.iter().find(|blob| Digest::of(blob).to_string() == descriptor["digest"]).unwrap().clone();
    let served = Served::new(move |request, before| match request.path.as_str() {
        "/v2/" => Reply::Challenge("Basic realm=\"here\"".to_owned()),
        _ => answer(request, before, &manifest).unwrap(),
    });
    let asked = |auth| served.registry(auth).manifest(&served.name).map_err(|error| format!("{error:#}"));
    assert!(asked(basic()).is_ok());
    let error = asked(RegistryAuth::Anonymous).unwrap_err();
    assert!(error.contains("login") && error.contains("the hint"), "{error}");
}

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let served = Served::new(|request, _| {
        let authorization = request.authorization.as_deref();
        match request.path.split('?').next().unwrap() {
            "/v2/" => Reply::Challenge(String::new()),
            "/token" if authorization == Some("Basic bWU6c2VjcmV0") => Reply::Status(200, r#"{"token": "t0"}"#),
            "/token" => Reply::Status(401, ""),
            _ if authorization == Some("Bearer t0") => Reply::Status(200, "{}"),
            _ => Reply::Status(401, ""),
        }
    });
    let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", served.name.registry());
    let front = Served::new(move |request, _| match (request.path.as_str(), request.authorization.as_deref()) {
        ("/v2/", _) => Reply::Challenge(realm.clone()),
        (_, Some("Bearer t0")) => Reply::Status(200, "{}"),
        _ => Reply::Status(401, ""),
    });
    let manifest = front.registry(RegistryAuth::Basic("me".to_owned(), "secret".to_owned())).manifest(&front.name);
    assert_eq!(manifest.unwrap(), b"{}");
    let tokens = served.asked.lock().unwrap().iter().filter(|request| request.path.contains("name%3Apull")).count();
    assert_eq!(tokens, 1, "it says what for");
    let error = front.registry(RegistryAuth::Anonymous).manifest(&front.name).unwrap_err();
    assert!(format!("{error:#}").contains("the hint"), "{error:#}");
}
