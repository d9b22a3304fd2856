//! The profile as data: what must not be in it, and that the rest of it means something.

use std::collections::BTreeSet;

use super::*;

/// All calls of x86_64, one a line, as the kernel's headers name them.
const KNOWN: &str = include_str!("x86_64.txt");

/// What would help out of the cell, or harm others from inside: each with a history or without a use in here.
const DENIED: &str = "
    ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp
    splice tee vmsplice
    mount umount2 mount_setattr move_mount open_tree fsopen fsconfig fsmount fspick pivot_root chroot
    setns unshare clone3
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register memfd_secret
    keyctl add_key request_key
    name_to_handle_at open_by_handle_at
    fanotify_init fanotify_mark
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    msgget msgsnd msgrcv msgctl semget semop semtimedop semctl shmget shmat shmctl shmdt
    mbind set_mempolicy get_mempolicy migrate_pages move_pages set_mempolicy_home_node
    mlock mlock2 mlockall
    modify_ldt iopl ioperm
    init_module finit_module delete_module kexec_load kexec_file_load reboot
    swapon swapoff syslog acct quotactl quotactl_fd sethostname setdomainname vhangup
    adjtimex clock_adjtime clock_settime settimeofday
    lookup_dcookie uselib ustat sysfs seccomp nfsservctl";

fn rules() -> Vec<Value> {
    let profile: Value = serde_json::from_str(SOURCE).expect("the profile is JSON");
    profile["syscalls"].as_array().expect("rules").clone()
}

fn names(rule: &Value) -> Vec<&str> {
    rule["names"].as_array().expect("names").iter().map(|n| n.as_str().expect("a name")).collect()
}

#[test]
fn what_is_not_named_is_refused_and_only_native_calls_are_looked_at() {
    let profile: Value = serde_json::from_str(SOURCE).expect("the profile is JSON");
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    for architecture in profile["archMap"].as_array().expect("architectures") {
        assert_eq!(architecture["subArchitectures"], serde_json::json!([]));
    }
}

#[test]
fn nothing_on_the_deny_list_is_allowed() {
    let denied: BTreeSet<_> = DENIED.split_whitespace().collect();
    for rule in rules().iter().filter(|rule| rule["action"] == "SCMP_ACT_ALLOW") {
        for name in names(rule) {
            assert!(!denied.contains(name), "{name} is allowed: {}", rule["comment"]);
        }
    }
}

#[test]
fn every_rule_is_well_formed() {
    for rule in rules() {
        assert!(rule["comment"].as_str().is_some_and(|c| c.ends_with('.')), "{rule} says why");
        match rule["action"].as_str() {
            Some("SCMP_ACT_ALLOW") => assert!(rule.get("errnoRet").is_none()),
            Some("SCMP_ACT_ERRNO") => assert_eq!(rule["errnoRet"], 38, "ENOSYS"),
            other => panic!("{other:?}"),
        }
        assert!(!names(&rule).is_empty());
        for arg in rule.get("args").and_then(Value::as_array).into_iter().flatten() {
            assert!(arg["index"].as_u64().is_some_and(|i| i < 6), "{arg}");
            assert!(arg["value"].is_u64(), "{arg}");
            match arg["op"].as_str() {
                Some("SCMP_CMP_EQ") => assert!(arg.get("valueTwo").is_none(), "{arg}"),
                Some("SCMP_CMP_MASKED_EQ") => assert!(arg["valueTwo"].is_u64(), "{arg}"),
                other => panic!("{other:?} of {arg}"),
            }
        }
    }
}

#[test]
fn every_name_is_a_system_call_and_unconditional_only_once() {
    let known: BTreeSet<_> = KNOWN.lines().collect();
    let mut unconditional = BTreeSet::new();
    let mut conditional = BTreeSet::new();
    for rule in &rules() {
        for name in names(rule) {
            assert!(known.contains(name), "{name} is no system call");
            if rule.get("args").is_some() || rule.get("exceptFirstProcess").is_some() {
                conditional.insert(name.to_owned());
            } else {
                assert!(unconditional.insert(name.to_owned()), "{name} stands in two rules");
            }
        }
    }
    // One rule without conditions would open what the others close.
    assert_eq!(unconditional.intersection(&conditional).count(), 0);
    let filtered: Vec<_> = conditional.iter().map(String::as_str).collect();
    let expected = [
        "clone",
        "ioprio_set",
        "kill",
        "mknod",
        "mknodat",
        "personality",
        "pidfd_open",
        "prlimit64",
        "rt_sigqueueinfo",
        "rt_tgsigqueueinfo",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "setpriority",
        "socket",
        "socketpair",
        "tgkill",
        "tkill",
    ];
    assert_eq!(filtered, expected);
}

#[test]
fn what_is_sent_is_the_file_without_its_comments() {
    let sent: Value = serde_json::from_str(profile(false)).expect("JSON");
    assert!(!profile(false).contains("comment"));
    let of_anybody = rules().iter().filter(|rule| rule.get("exceptFirstProcess").is_some()).count();
    assert_eq!(sent["syscalls"].as_array().map(Vec::len), Some(rules().len() + 31 * of_anybody));
    assert!(!profile(false).contains("exceptFirstProcess"));
    assert!(profile(false).contains("inotify_init1"));
    assert!(!profile(true).contains("inotify"));
}

#[test]
fn an_id_passes_unless_it_is_that_of_the_first_process() {
    let rule = serde_json::json!({"names": ["kill"], "action": "SCMP_ACT_ALLOW", "exceptFirstProcess": 0});
    let rules = expanded(rule);
    let passes = |id: u64| {
        rules.iter().any(|rule| {
            let arg = &rule["args"][0];
            id & arg["value"].as_u64().expect("a mask") == arg["valueTwo"].as_u64().expect("a value")
        })
    };
    assert!([0, 2, 3, 4_000_000, u64::from(u32::MAX), u64::MAX, 1 << 31].into_iter().all(passes));
    assert!(![1, 1 << 32 | 1, u64::MAX << 32 | 1].into_iter().any(passes));
}
