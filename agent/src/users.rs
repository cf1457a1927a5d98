//! Users and groups, from `/etc/passwd` and `/etc/group` (passwd(5), group(5)). The C library's lookups
//! are not used: in a static program they need to load the guest's libraries.

use std::fs;
use std::io;

use pulau_agent_protocol::message::{ErrorCode, ErrorReply};

use crate::refusal::{Context, bad_request};

/// As whom a process runs, or who owns a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    pub name: String,
    pub home: String,
    pub shell: String,
}

/// Finds whom `name`, `uid`, `name:group` or `uid:gid` means. A uid that is nobody's gets the gid of the
/// same number; a named group takes the place of all of the user's groups.
///
/// # Errors
/// `not_found` for a name that is not there; `bad_request` for an empty one.
pub fn resolve(spec: &str) -> Result<Credentials, ErrorReply> {
    let passwd = read("/etc/passwd")?;
    let group = read("/etc/group")?;
    find(spec, &passwd, &group)
}

/// A file that is not there has no lines: an image of a single program may have no users.
fn read(path: &str) -> Result<String, ErrorReply> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e).context(path),
    }
}

fn find(spec: &str, passwd: &str, group: &str) -> Result<Credentials, ErrorReply> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    if user.is_empty() || wanted_group == Some("") {
        return Err(bad_request(format!("user {spec:?}: must be name, uid, name:group or uid:gid")));
    }
    let mut found = find_user(user, passwd, group)?;
    if let Some(wanted) = wanted_group {
        found.gid = find_group(wanted, group)?;
        found.groups.clear();
    }
    Ok(found)
}

fn find_user(user: &str, passwd: &str, group: &str) -> Result<Credentials, ErrorReply> {
    let uid: Option<u32> = user.parse().ok();
    let entries = || passwd.lines().filter_map(parse_user);
    let by_name = entries().find(|entry| entry.name == user);
    match (by_name.or_else(|| entries().find(|entry| Some(entry.uid) == uid)), uid) {
        (Some(mut entry), _) => {
            entry.groups = groups_of(&entry, group);
            Ok(entry)
        }
        // -1 means "unchanged" to setresuid(2).
        (None, Some(uid)) if uid != u32::MAX => Ok(Credentials {
            uid,
            gid: uid,
            groups: Vec::new(),
            name: if uid == 0 { "root".to_owned() } else { user.to_owned() },
            home: if uid == 0 { "/root".to_owned() } else { "/".to_owned() },
            shell: "/bin/sh".to_owned(),
        }),
        _ => Err(ErrorReply::new(ErrorCode::NotFound, format!("user {user:?}: not in /etc/passwd"))),
    }
}

fn find_group(wanted: &str, group: &str) -> Result<u32, ErrorReply> {
    let by_name = group.lines().filter_map(parse_group).find(|(name, _, _)| *name == wanted);
    match (by_name, wanted.parse()) {
        (Some((_, gid, _)), _) => Ok(gid),
        (None, Ok(gid)) if gid != u32::MAX => Ok(gid),
        _ => Err(ErrorReply::new(ErrorCode::NotFound, format!("group {wanted:?}: not in /etc/group"))),
    }
}

/// `name:password:uid:gid:comment:home:shell`
fn parse_user(line: &str) -> Option<Credentials> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/");
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh");
    Some(Credentials {
        uid,
        gid,
        groups: Vec::new(),
        name: name.to_owned(),
        home: home.to_owned(),
        shell: shell.to_owned(),
    })
}

/// `name:password:gid:member,member`
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or("")))
}

fn groups_of(user: &Credentials, group: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(parse_group)
        .filter(|(_, gid, members)| *gid != user.gid && members.split(',').any(|m| m == user.name))
        .map(|(_, gid, _)| gid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\n\nbroken\nweb:x:33:33::/srv/web:\n42:x:7:7::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\nlog:x:4:root,web\nssl:x:9:web\nnone:x:10:web2,xweb\n";

    fn summary(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let c = find(spec, PASSWD, GROUP).unwrap();
        (c.uid, c.gid, c.groups, c.home)
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(summary("web"), (33, 33, vec![4, 9], "/srv/web".into()));
        assert_eq!(summary("33"), (33, 33, vec![4, 9], "/srv/web".into()));
        assert_eq!(summary("42"), (7, 7, vec![], "/".into()), "a name goes before a number");
        assert_eq!(summary("1234"), (1234, 1234, vec![], "/".into()));
        assert_eq!(summary("web:ssl"), (33, 9, vec![], "/srv/web".into()));
        assert_eq!(summary("1234:77"), (1234, 77, vec![], "/".into()));
        assert_eq!(find("web", PASSWD, GROUP).unwrap().shell, "/bin/sh");
    }

    #[test]
    fn who_is_not_there_is_named() {
        let fails = |spec| {
            let error = find(spec, PASSWD, GROUP).unwrap_err();
            (error.code, error.message)
        };
        assert_eq!(fails("nobody"), (ErrorCode::NotFound, "user \"nobody\": not in /etc/passwd".into()));
        assert_eq!(fails("web:wheel"), (ErrorCode::NotFound, "group \"wheel\": not in /etc/group".into()));
        assert_eq!(fails("4294967295").0, ErrorCode::NotFound);
        assert_eq!(fails("-1").0, ErrorCode::NotFound);
        assert_eq!(fails("").0, ErrorCode::BadRequest);
        assert_eq!(fails("web:").0, ErrorCode::BadRequest);
    }

    #[test]
    fn root_needs_no_files() {
        let root = find("0", "", "").unwrap();
        assert_eq!((root.uid, root.gid, root.name.as_str(), root.home.as_str()), (0, 0, "root", "/root"));
    }
}
