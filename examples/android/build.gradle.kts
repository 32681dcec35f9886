plugins {
    id("com.android.application") version "8.7.3"
    id("org.jetbrains.kotlin.android") version "2.0.21"
}

android {
    namespace = "org.recnext.sample"
    compileSdk = 35
    defaultConfig {
        minSdk = 28
        targetSdk = 35
    }
    // The weights do not get smaller, and are copied out once as they are.
    androidResources { noCompress += "pte" }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

dependencies {
    // The version that wrote the file, or a newer one: pip show executorch
    implementation("org.pytorch:executorch-android:1.5.1")
}
