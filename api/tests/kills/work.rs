//! What clients ask of a daemon until it dies, and what they may rely on afterwards.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::host::{Daemon, Failure, Host};

/// Numbers that differ, and are the same each time (xorshift64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What was asked of something last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    Running,
    Stopped,
    Gone,
    /// There, whatever it is.
    There,
}

/// What may be wanted of a thing: what was acknowledged last, and what was asked and never answered since.
#[derive(Clone, Debug)]
pub struct Known {
    pub acknowledged: Want,
    pub perhaps: Option<Want>,
}

impl Known {
    fn new(want: Want) -> Self {
        Known { acknowledged: want, perhaps: None }
    }

    pub fn allows(&self, want: Want) -> bool {
        self.acknowledged == want || self.perhaps == Some(want)
    }
}

/// What the clients know.
#[derive(Debug, Default)]
pub struct Model {
    /// By id.
    pub instances: BTreeMap<String, Known>,
    /// By kind and name, or the tag `Name`: `/v1/networks/a`.
    pub things: BTreeMap<String, Known>,
    /// A request to run instances that was never answered. Sent again, it has to be fulfilled once.
    pub unanswered: Option<Value>,
    count: u32,
}

/// One daemon and the clients' view of it.
pub struct Clients<'a> {
    pub daemon: &'a mut Daemon,
    pub model: &'a mut Model,
}

/// The daemon has died.
pub struct Dead;

/// Asks for everything that can be asked for, and then for this and that, until the daemon dies or enough was
/// asked.
pub fn work(daemon: &mut Daemon, host: &Host, model: &mut Model, dice: &mut Dice, passage: u32) {
    let mut clients = Clients { daemon, model };
    let rounds = if passage == 1 { 1 } else { 2 };
    for _ in 0..rounds {
        if clients.everything(host).is_err() {
            return clients.daemon.wait_dead();
        }
    }
    for _ in 0..dice.below(20) {
        if clients.something(dice).is_err() {
            return clients.daemon.wait_dead();
        }
    }
}

impl Clients<'_> {
    /// A request about something that is known. Refusals leave it as it was.
    fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Option<Value>, Dead> {
        match self.daemon.call(method, path, body) {
            Ok(answer) => Ok(Some(answer)),
            Err(Failure::Refused(_)) => Ok(None),
            Err(Failure::Lost) => Err(Dead),
        }
    }

    fn name(&mut self, what: &str) -> String {
        self.model.count += 1;
        format!("{what}{}", self.model.count)
    }

    pub fn run(&mut self, more: Value) -> Result<Option<String>, Dead> {
        let mut body = json!({"image": "tiny", "root_size_gib": 1, "instance_type": "nano"});
        body["client_token"] = self.name("token").into();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.model.unanswered = Some(body.clone());
        let answer = self.ask("POST", "/v1/instances", Some(&body))?;
        self.ran(answer)
    }

    /// Sends the request again that was never answered.
    pub fn run_again(&mut self) -> Result<(), Dead> {
        if let Some(body) = self.model.unanswered.clone() {
            let answer = self.ask("POST", "/v1/instances", Some(&body))?;
            self.ran(answer)?;
        }
        Ok(())
    }

    fn ran(&mut self, answer: Option<Value>) -> Result<Option<String>, Dead> {
        self.model.unanswered = None;
        let Some(answer) = answer else { return Ok(None) };
        assert_eq!(answer["instances"].as_array().unwrap().len(), 1, "{answer}");
        let id = answer["instances"][0]["id"].as_str().unwrap().to_owned();
        self.model.instances.insert(id.clone(), Known::new(Want::Running));
        Ok(Some(id))
    }

    pub fn change(&mut self, id: &str, action: &str, want: Want) -> Result<bool, Dead> {
        self.model.instances.get_mut(id).unwrap().perhaps = Some(want);
        let path = format!("/v1/instances/{id}");
        let answer = match action {
            "terminate" => self.ask("DELETE", &path, None),
            action => self.ask("POST", &format!("{path}/{action}"), Some(&json!({}))),
        }?;
        let known = self.model.instances.get_mut(id).unwrap();
        known.perhaps = None;
        if answer.is_some() {
            known.acknowledged = want;
        }
        Ok(answer.is_some())
    }

    fn thing(&mut self, method: &str, path: &str, key: &str, body: Value) -> Result<Option<Value>, Dead> {
        let want = if method == "DELETE" { Want::Gone } else { Want::There };
        let before = self.model.things.get(key).map_or(Want::Gone, |known| known.acknowledged);
        let known = Known { acknowledged: before, perhaps: Some(want) };
        self.model.things.insert(key.to_owned(), known);
        let done = self.ask(method, path, Some(&body))?;
        let acknowledged = if done.is_some() { want } else { before };
        self.model.things.insert(key.to_owned(), Known::new(acknowledged));
        Ok(done)
    }

    fn make(&mut self, kind: &str, name: &str, mut body: Value) -> Result<Option<Value>, Dead> {
        body["name"] = name.into();
        self.thing("POST", &format!("/v1/{kind}"), &format!("/v1/{kind}/{name}"), body)
    }

    fn unmake(&mut self, kind: &str, name: &str) -> Result<(), Dead> {
        let path = format!("/v1/{kind}/{name}");
        self.thing("DELETE", &path, &path, json!({})).map(drop)
    }

    /// Waits, as long as the daemon lives.
    fn until(&mut self, path: &str, holds: impl Fn(&Value) -> bool) -> Result<(), Dead> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            match self.ask("GET", path, None)? {
                Some(answer) if holds(&answer) => return Ok(()),
                None => return Ok(()),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        Ok(())
    }

    fn until_instance(&mut self, id: &str, state: &str) -> Result<(), Dead> {
        self.until(&format!("/v1/instances/{id}"), |instance| instance["state"] == state)
    }

    fn import(&mut self, host: &Host, name: &str) -> Result<(), Dead> {
        let path = |name: &str| host.path(name).to_string_lossy().into_owned();
        let body = json!({"root": path("files/root"), "kernel": path("files/kernel")});
        self.make("images", name, body)?;
        self.until(&format!("/v1/images/{name}"), |image| image["state"] != "pending")
    }

    /// What others need: an image that can be run.
    fn image(&mut self, host: &Host) -> Result<(), Dead> {
        let image = self.ask("GET", "/v1/images/tiny", None)?;
        match image {
            Some(image) if image["state"] == "available" => return Ok(()),
            Some(_) => self.unmake("images", "tiny")?,
            None => {}
        }
        self.import(host, "tiny")
    }

    /// Every operation there is, once.
    fn everything(&mut self, host: &Host) -> Result<(), Dead> {
        self.image(host)?;
        let Some(id) = self.run(json!({}))? else { return Ok(()) };
        let image = self.name("image");
        self.import(host, &image)?;
        self.unmake("images", &image)?;
        self.until_instance(&id, "running")?;
        self.change(&id, "reboot", Want::Running)?;
        let (network, group, key) = (self.name("net"), self.name("group"), self.name("key"));
        let subnet = format!("10.200.{}.0/24", self.model.count % 250);
        self.make("networks", &network, json!({"subnet": subnet}))?;
        self.make("key-pairs", &key, json!({}))?;
        let made = self.make("security-groups", &group, json!({}))?.unwrap_or_default();
        let group_path = format!("/v1/security-groups/{}", made["id"].as_str().unwrap_or_default());
        let rule = json!({"protocol": "tcp", "from_port": 80, "to_port": 80, "peer": {"cidr": "0.0.0.0/0"}});
        self.ask("PATCH", &group_path, Some(&json!({"ingress": [rule]})))?;
        let other = self.run(json!({"network": network}))?;
        let groups = |group: &str| json!({"security_groups": [group]});
        let path = format!("/v1/instances/{id}");
        self.ask("PATCH", &path, Some(&groups(&group)))?;
        self.change(&id, "stop", Want::Stopped)?;
        self.until_instance(&id, "stopped")?;
        self.change(&id, "start", Want::Running)?;
        if let Some(other) = other {
            self.until_instance(&other, "running")?;
            self.change(&other, "terminate", Want::Gone)?;
            self.until_instance(&other, "terminated")?;
        }
        self.ask("PATCH", &path, Some(&groups("default")))?;
        let key_of_group = format!("/v1/security-groups/{group}");
        self.thing("DELETE", &group_path, &key_of_group, json!({}))?;
        self.unmake("networks", &network)?;
        self.unmake("key-pairs", &key)?;
        self.storage()?;
        self.one_that_fails(host)?;
        self.until_instance(&id, "running")?;
        self.change(&id, "terminate", Want::Gone)?;
        // Until it is forgotten.
        self.until(&format!("/v1/instances/{id}"), |_| false)
    }

    /// A volume, and a snapshot of it.
    fn storage(&mut self) -> Result<(), Dead> {
        let (volume, snapshot) = (self.name("volume"), self.name("snapshot"));
        let (volume_key, snapshot_key) =
            (format!("/v1/volumes/{volume}"), format!("/v1/snapshots/{snapshot}"));
        let body = json!({"size_gib": 1, "tags": {"Name": volume}});
        let Some(made) = self.thing("POST", "/v1/volumes", &volume_key, body)? else { return Ok(()) };
        let volume_path = format!("/v1/volumes/{}", made["id"].as_str().unwrap());
        self.until(&volume_path, |volume| volume["state"] != "creating")?;
        let body = json!({"volume_id": made["id"], "tags": {"Name": snapshot}});
        if let Some(taken) = self.thing("POST", "/v1/snapshots", &snapshot_key, body)? {
            let path = format!("/v1/snapshots/{}", taken["id"].as_str().unwrap());
            self.until(&path, |snapshot| snapshot["state"] != "pending")?;
            self.thing("DELETE", &path, &snapshot_key, json!({}))?;
        }
        self.thing("DELETE", &volume_path, &volume_key, json!({})).map(drop)
    }

    /// An instance whose image has lost its file, so that it cannot boot.
    fn one_that_fails(&mut self, host: &Host) -> Result<(), Dead> {
        let image = self.name("broken");
        let root = host.path("files/other");
        let mut bytes = std::fs::read(host.path("files/root")).unwrap();
        bytes[0..8].copy_from_slice(&u64::from(self.model.count).to_le_bytes());
        std::fs::write(&root, bytes).unwrap();
        let path = |name: &str| host.path(name).to_string_lossy().into_owned();
        let body = json!({"root": path("files/other"), "kernel": path("files/kernel")});
        self.make("images", &image, body)?;
        self.until(&format!("/v1/images/{image}"), |image| image["state"] != "pending")?;
        let Some(shown) = self.ask("GET", &format!("/v1/images/{image}"), None)? else { return Ok(()) };
        let digest = shown["manifest"]["root"]["digest"].as_str().map(str::to_owned);
        let Some(digest) = digest else { return Ok(()) };
        let blob = format!("data/images/blobs/sha256/{}", digest.trim_start_matches("sha256:"));
        std::fs::remove_file(host.path(&blob)).unwrap();
        if let Some(id) = self.run(json!({"image": image, "tags": {"fails": ""}}))? {
            self.until(&format!("/v1/instances/{id}"), |instance| !instance["state_reason"].is_null())?;
            self.change(&id, "terminate", Want::Gone)?;
            self.until_instance(&id, "terminated")?;
        }
        self.unmake("images", &image)
    }

    fn something(&mut self, dice: &mut Dice) -> Result<(), Dead> {
        let alive: Vec<String> = {
            let alive = self.model.instances.iter().filter(|(_, known)| !known.allows(Want::Gone));
            alive.map(|(id, _)| id.clone()).collect()
        };
        let some = alive.get(dice.below(alive.len().max(1) as u64) as usize).cloned();
        match (dice.below(7), some) {
            (0 | 1, _) | (_, None) if alive.len() < 4 => self.run(json!({})).map(drop),
            (2, Some(id)) => self.change(&id, "stop", Want::Stopped).map(drop),
            (3, Some(id)) => self.change(&id, "start", Want::Running).map(drop),
            (4, Some(id)) => self.change(&id, "reboot", Want::Running).map(drop),
            (_, Some(id)) => self.change(&id, "terminate", Want::Gone).map(drop),
            (_, None) => Ok(()),
        }
    }
}
