// Command etcd is the etcd server at the version that the Kubernetes release
// is tested with: the API server offers streaming lists only over 3.4.25 or
// newer (RequestWatchProgress), and distributions ship older ones.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
