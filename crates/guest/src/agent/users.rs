//! Users and groups, from `/etc/passwd` and `/etc/group` (passwd(5), group(5)): a static program has no other way.
//!
//! Left out on purpose: every other source of users (LDAP, systemd's).

use std::fs::File;
use std::io::{ErrorKind, Read as _};

/// The most bytes of a file that are looked at.
const MOST: u64 = 16 << 20;

/// Whom a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) name: Option<String>,
    pub(crate) home: String,
}

/// What the two files hold.
pub(crate) struct Files {
    passwd: String,
    group: String,
}

impl Files {
    /// Reads them; what is missing is empty.
    ///
    /// # Errors
    ///
    /// One of them cannot be read.
    pub(crate) fn read() -> Result<Self, String> {
        Ok(Self { passwd: read("/etc/passwd")?, group: read("/etc/group")? })
    }

    /// The user that `name|uid[:group|gid]` says. Whoever names a group has no other ones.
    ///
    /// # Errors
    ///
    /// A name is unknown.
    pub(crate) fn find(&self, user: &str) -> Result<User, String> {
        let (user, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
        let by_name = self.users().find(|entry| entry.name == user);
        let mut found = match (by_name, user.parse()) {
            (Some(entry), _) => self.user(&entry),
            (None, Ok(uid)) => self.by_uid(uid),
            (None, Err(_)) => return Err(format!("There is no user {user:?} in /etc/passwd")),
        };
        if let Some(group) = group {
            let by_name = self.groups().find(|(name, ..)| *name == group).map(|(_, gid, _)| gid);
            let gid = by_name.or_else(|| group.parse().ok());
            found.gid = gid.ok_or_else(|| format!("There is no group {group:?} in /etc/group"))?;
            found.groups.clear();
        }
        Ok(found)
    }

    /// The user with a number, which nobody needs to have.
    pub(crate) fn by_uid(&self, uid: u32) -> User {
        let entry = self.users().find(|entry| entry.uid == uid);
        let nobody = User { uid, gid: 0, groups: Vec::new(), name: None, home: "/".into() };
        entry.map_or(nobody, |entry| self.user(&entry))
    }

    fn user(&self, entry: &Entry<'_>) -> User {
        let member = |members: &str| members.split(',').any(|member| member == entry.name);
        let groups = self.groups().filter(|(_, gid, members)| *gid != entry.gid && member(members));
        let home = if entry.home.is_empty() { "/" } else { entry.home };
        User {
            uid: entry.uid,
            gid: entry.gid,
            groups: groups.map(|(_, gid, _)| gid).collect(),
            name: Some(entry.name.to_owned()),
            home: home.to_owned(),
        }
    }

    fn users(&self) -> impl Iterator<Item = Entry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
            Some(Entry { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home })
        })
    }

    /// Name, number and members.
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, gid, members] = fields[..] else { return None };
            Some((name, gid.parse().ok()?, members))
        })
    }
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn read(path: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut bytes)) {
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(format!("Cannot read {path}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# a comment\nbroken:x:one:1:::\n\
                      web:x:33:34:,,,:/var/www:/usr/sbin/nologin\nbare:x:50:51::\n100:x:60:60::/h:\n";
        let group = "root:x:0:\nweb:x:34:web\nlog:x:4:syslog,web\nssl:x:110:webmaster,web\nbroken:x\n";
        Files { passwd: passwd.into(), group: group.into() }
    }

    fn user(uid: u32, gid: u32, groups: &[u32], name: Option<&str>, home: &str) -> User {
        User { uid, gid, groups: groups.to_vec(), name: name.map(Into::into), home: home.into() }
    }

    #[test]
    fn a_user_is_found_by_name_with_all_its_groups() {
        assert_eq!(files().find("web").unwrap(), user(33, 34, &[4, 110], Some("web"), "/var/www"));
        assert_eq!(files().find("root").unwrap(), user(0, 0, &[], Some("root"), "/root"));
        assert_eq!(files().find("bare").unwrap(), user(50, 51, &[], Some("bare"), "/"));
    }

    #[test]
    fn a_user_is_found_by_number_and_need_not_be_listed() {
        assert_eq!(files().find("33").unwrap(), user(33, 34, &[4, 110], Some("web"), "/var/www"));
        assert_eq!(files().find("77").unwrap(), user(77, 0, &[], None, "/"));
        assert_eq!(files().find("100").unwrap(), user(60, 60, &[], Some("100"), "/h"), "a name comes first");
    }

    #[test]
    fn a_named_group_replaces_all_others() {
        assert_eq!(files().find("web:ssl").unwrap(), user(33, 110, &[], Some("web"), "/var/www"));
        assert_eq!(files().find("77:5").unwrap(), user(77, 5, &[], None, "/"));
    }

    #[test]
    fn unknown_names_and_numbers_that_are_none_are_refused() {
        for (spec, part) in [("nobody", "nobody"), ("", "\"\""), ("-1", "-1"), ("broken", "broken"), ("web:x", "\"x\"")]
        {
            let error = files().find(spec).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(files().find("4294967296").is_err());
    }
}
