# Answers every request at port 8000 with the kernel's release, and with what the other world answers, if one is named.
use strict;
use warnings;
use IO::Socket::INET;
use POSIX qw(uname);

my ($other) = @ARGV;

sub ask {
    my $socket = IO::Socket::INET->new(PeerAddr => "$other:8000", Timeout => 10) or return "does not answer\n";
    print $socket "GET / HTTP/1.0\r\n\r\n";
    my $answer = do { local $/; <$socket> };
    return (split /\r\n\r\n/, $answer, 2)[1] // "answers wrongly\n";
}

# A client that has gone is no reason to end.
$SIG{PIPE} = 'IGNORE';
my $service = IO::Socket::INET->new(LocalPort => 8000, Listen => 100, ReuseAddr => 1) or die "no port: $!";
while (my $client = $service->accept) {
    while (defined(my $line = <$client>)) { last if $line =~ /^\r?\n$/ }
    my $body = "Linux " . (uname)[2] . "\n" . ($other ? "$other: " . ask() : '');
    print $client "HTTP/1.0 200 OK\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
    close $client;
}
