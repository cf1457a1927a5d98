//! `pulau instance publish` and `unpublish`, and `run --publish`

use std::net::Ipv4Addr;

use crate::model::{PublishedPort, Transport};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance publish i-0123456789abcdef0 8080:80
  pulau instance publish i-0123456789abcdef0 192.0.2.1:53:53/udp")]
pub struct PublishArgs {
    /// Id of an instance.
    pub id: String,
    /// [ADDRESS:]HOSTPORT:PORT[/udp]; on all of the host's addresses unless one is given.
    #[arg(required = true, value_name = "PORT", value_parser = published_port)]
    pub ports: Vec<PublishedPort>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance unpublish i-0123456789abcdef0 8080:80")]
pub struct UnpublishArgs {
    /// Id of an instance.
    pub id: String,
    /// As it was published.
    #[arg(required = true, value_name = "PORT", value_parser = published_port)]
    pub ports: Vec<PublishedPort>,
}

/// `[ADDRESS:]HOSTPORT:PORT[/udp]`
pub fn published_port(text: &str) -> Result<PublishedPort, String> {
    let expected = || "expected [ADDRESS:]HOSTPORT:PORT[/udp], such as 8080:80".to_owned();
    let (ports, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some(_) => return Err(expected()),
    };
    let (host, port) = ports.rsplit_once(':').ok_or_else(expected)?;
    let (host_address, host_port) = match host.rsplit_once(':') {
        Some((address, port)) => (Some(address.parse::<Ipv4Addr>().map_err(|_| expected())?), port),
        None => (None, host),
    };
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(expected);
    Ok(PublishedPort { protocol, host_address, host_port: number(host_port)?, port: number(port)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_one_expects() {
        let port = published_port("8080:80").unwrap();
        assert_eq!(
            (port.protocol, port.host_address, port.host_port, port.port),
            (Transport::Tcp, None, 8080, 80)
        );
        assert_eq!(published_port("8080:80/tcp").unwrap(), port);
        let port = published_port("192.0.2.1:53:5353/udp").unwrap();
        assert_eq!((port.protocol, port.host_port, port.port), (Transport::Udp, 53, 5353));
        assert_eq!(port.host_address, Some(Ipv4Addr::new(192, 0, 2, 1)));
        for bad in ["80", "80:", ":80", "0:80", "80:0", "80:80/sctp", "x:80:80", "70000:80", ""] {
            assert!(published_port(bad).is_err(), "{bad}");
        }
    }
}
