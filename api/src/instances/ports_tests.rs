//! Published ports: what the host has to give is given once.

use super::*;
use crate::model::{PublishedPort, Transport};

fn port(host_port: u16, host_address: Option<&str>) -> PublishedPort {
    let host_address = host_address.map(|address| address.parse().unwrap());
    PublishedPort { protocol: Transport::Tcp, host_address, host_port, port: 80 }
}

/// A port of this machine on which nothing listens, most likely.
fn free_port() -> u16 {
    std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_port_of_the_host_leads_to_one_instance() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let first = port(free_port(), None);
    let a = run_one(&service, serde_json::json!({"published_ports": [first]})).await;
    let b = run_one(&service, serde_json::json!({})).await;
    assert_eq!(service.get(&a).unwrap().published_ports, [first]);
    for taken in [first, PublishedPort { host_address: Some([203, 0, 113, 1].into()), ..first }] {
        let refused = service.publish(&b, taken).await.unwrap_err();
        assert!(matches!(&refused, Error::PortInUse { by, .. } if by.contains(&a)), "{refused}");
    }
    let refused = service.run(request(serde_json::json!({"published_ports": [first]}))).await;
    assert!(matches!(refused, Err(Error::PortInUse { .. })), "{refused:?}");
    // UDP has ports of its own.
    let udp = PublishedPort { protocol: Transport::Udp, ..first };
    service.publish(&b, udp).await.unwrap();
    service.publish(&b, udp).await.unwrap();
    assert_eq!(service.get(&b).unwrap().published_ports, [udp]);

    // It stays through a stop, and a daemon; it ends by request or with the instance.
    service.stop(&a, StopInstance::default()).await.unwrap();
    reaches(&service, &a, InstanceState::Stopped).await;
    assert!(service.publish(&b, first).await.is_err());
    service.unpublish(&a, first).await.unwrap();
    assert!(matches!(service.unpublish(&a, first).await, Err(Error::NotFound { .. })));
    service.publish(&b, first).await.unwrap();
    service.let_go().await;
    drop(service);
    let service = daemon(dir.path(), &simulation).await;
    assert_eq!(service.get(&b).unwrap().published_ports, [udp, first]);
    service.terminate(&b).await.unwrap();
    reaches(&service, &b, InstanceState::Terminated).await;
    assert!(matches!(service.publish(&b, first).await, Err(Error::State { .. })));
    service.publish(&a, first).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_published_is_refused() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let id = run_one(&service, serde_json::json!({})).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = port(listener.local_addr().unwrap().port(), None);
    let refused = service.publish(&id, taken).await.unwrap_err();
    assert!(matches!(&refused, Error::PortInUse { by, .. } if by.contains("program")), "{refused}");
    for (bad, problem) in [
        (port(0, None), "1 to 65535"),
        (PublishedPort { port: 0, ..port(80, None) }, "1 to 65535"),
        (port(8080, Some("127.0.0.1")), "127.0.0.1"),
        (port(8080, Some("203.0.113.77")), "none of this host's"),
    ] {
        let refused = service.publish(&id, bad).await.unwrap_err().to_string();
        assert!(refused.contains(problem), "{refused}");
    }
    let free = port(free_port(), None);
    for bad in [
        serde_json::json!({"published_ports": [free], "min_count": 2}),
        serde_json::json!({"published_ports": [free, free]}),
    ] {
        let refused = service.run(request(bad)).await.unwrap_err().to_string();
        assert!(refused.contains("published_ports"), "{refused}");
    }
    assert!(service.get(&id).unwrap().published_ports.is_empty());
}
