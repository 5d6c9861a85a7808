module ringfence.dev/integration/verbs

go 1.19
